"""Source files that are downloaded when they are needed, and may be deleted when they are not needed any more."""

from __future__ import annotations

import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moeprune.checkpoint.hub import Located, explained
from moeprune.errors import CheckpointError, ExportError
from moeprune.export.layout import Shard
from moeprune.export.target import existing_parent
from moeprune.format import size

DOWNLOADS = ".source"


class HubSources:
    """The shards of a model of the Hub.

    Those that are in the cache of huggingface_hub are read there and never deleted.

    Args:
        model: The model.
        shards: The output files that are still to be made.
        folder: Where to download to; what is there is deleted as soon as no output file needs it. None: into the cache
            of huggingface_hub, where it stays.
        check: Called with name and path of each download before it is used.
    """

    def __init__(
        self,
        model: Located,
        *,
        shards: Iterable[Shard],
        folder: Path | None,
        check: Callable[[str, Path], object] = lambda name, path: None,
    ) -> None:
        self._model, self._folder, self._check = model, folder, check
        self._here: dict[str, Path] = {}
        self._uses = Counter(file.name for shard in shards for file in shard.files)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def open(self, file: Path) -> AbstractContextManager[Path]:
        """Download the file unless it is here."""
        return self._borrow(file.name) if file.name in self._model.missing else nullcontext(file)

    @contextmanager
    def _borrow(self, name: str) -> Iterator[Path]:
        with self._locks[name]:
            if name not in self._here:
                path = self._download(name)
                self._check(name, path)
                self._here[name] = path
            path = self._here[name]
        yield path
        with self._locks[name]:
            self._uses[name] -= 1  # not reached if the reader failed: the next attempt will want it
            if self._folder is not None and self._uses[name] <= 0:
                path.unlink(missing_ok=True)
                del self._here[name]

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        model = self._model
        assert model.repo is not None, "only models of the Hub lack files"
        where: dict[str, Any] = {} if self._folder is None else {"local_dir": self._folder}
        try:
            with explained(model.repo):
                return Path(hf_hub_download(model.repo, name, revision=model.commit, **where))
        except CheckpointError as error:
            raise ExportError(f"{name}: {error} Finished shards are kept; run the same command again.") from error


def bytes_to_download(model: Located, shards: Iterable[Shard]) -> dict[str, int]:
    """Size by name of the source files that these output files need and that are not here."""
    needed = {file.name for shard in shards for file in shard.files}
    return {name: size for name, size in sorted(model.missing.items()) if name in needed}


def check_cache_space(needed: int, *, beside: int, out: Path) -> None:
    """Refuse downloads that the cache of huggingface_hub has no room for.

    Args:
        needed: Bytes to download.
        beside: Bytes that the export will take.
        out: Where it will take them.

    Raises:
        ExportError: If less is free.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, target = existing_parent(Path(HF_HUB_CACHE)), existing_parent(out)
    total = needed + (beside if cache.stat().st_dev == target.stat().st_dev else 0)
    free = shutil.disk_usage(cache).free
    if free < total:
        raise ExportError(
            f"{HF_HUB_CACHE}: the download takes {size(needed)}, that disk needs {size(total)} in all, "
            f"only {size(free)} are free. Use --no-keep-source, or set HF_HUB_CACHE."
        )
