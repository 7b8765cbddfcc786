"""A name -> implementation table that is cheap to list and says what it knows when a name is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from moeprune.errors import MoePruneError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named implementations of one kind.

    Args:
        kind: What the entries are, for messages (``"score"``).
        error: The error that an unknown name raises.
    """

    def __init__(self, kind: str, error: type[MoePruneError]):
        self.kind = kind
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add ``entry`` under ``name``; a name is given once."""
        assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            MoePruneError: The registry's own error, if there is none.
        """
        if name not in self._entries:
            raise self._error(f"unknown {self.kind} {name!r}. {did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
