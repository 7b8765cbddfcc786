"""Where the source's files are read from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol


class Sources(Protocol):
    """Gives source files to those who read them."""

    def open(self, file: Path, *, shard: str) -> AbstractContextManager[Path]:
        """A context in which the file can be read under the path it gives.

        Args:
            file: A source file, as the checkpoint names it.
            shard: Name of the output file that is made of it; each asks once.
        """
        ...


class LocalSources:
    """Files that are where the checkpoint says."""

    def open(self, file: Path, *, shard: str) -> AbstractContextManager[Path]:
        """The file itself."""
        return nullcontext(file)
