"""Where the source's files are read from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol


class Stopped(Exception):
    """The export was stopped; why is told elsewhere."""


class Sources(Protocol):
    """Gives source files to those who read them."""

    def open(self, file: Path) -> AbstractContextManager[Path]:
        """A context in which the file can be read under the path it gives; each output file asks once for each.

        Args:
            file: A source file, as the checkpoint names it.
        """
        ...

    def stop(self) -> None:
        """Make those who wait for a file give up with :class:`Stopped`."""
        ...


class LocalSources:
    """Files that are where the checkpoint says."""

    def open(self, file: Path) -> AbstractContextManager[Path]:
        """The file itself."""
        return nullcontext(file)

    def stop(self) -> None:
        """Nobody waits."""
