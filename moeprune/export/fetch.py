"""Source files that are downloaded when they are needed, and may be deleted when they are not needed any more."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moeprune.checkpoint.hub import TRIES, Located, abort_downloads, explained, is_transient
from moeprune.errors import CheckpointError, ExportError
from moeprune.export.layout import Shard
from moeprune.export.sources import Stopped
from moeprune.export.target import existing_parent
from moeprune.format import size

DOWNLOADS = ".source"
UNFINISHED = "*.incomplete"  # as huggingface_hub calls them; it never takes one up again


class HubSources:
    """The shards of a model of the Hub.

    Those that are in the cache of huggingface_hub are read there and never deleted.

    Args:
        model: The model.
        shards: The output files that are still to be made.
        folder: Where to download to; what is there is deleted as soon as no output file needs it, and what an earlier
            attempt left there and cannot be used, at once. None: into the cache of huggingface_hub, where it stays.
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
        self._readers: Counter[str] = Counter()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._stopped = threading.Event()
        if folder is not None and folder.is_dir():
            _delete_useless(folder, wanted=self._uses)

    def open(self, file: Path) -> AbstractContextManager[Path]:
        """Download the file unless it is here."""
        return self._borrow(file.name) if file.name in self._model.missing else nullcontext(file)

    def stop(self) -> None:
        """End all downloads that are under way; those who wait for one get :class:`Stopped`."""
        self._stopped.set()
        abort_downloads()

    @contextmanager
    def _borrow(self, name: str) -> Iterator[Path]:
        with self._locks[name]:
            if name not in self._here:
                path = self._download(name)
                self._check(name, path)
                self._here[name] = path
            path = self._here[name]
            self._readers[name] += 1
        try:
            yield path
        except BaseException:
            with self._locks[name]:
                self._readers[name] -= 1  # and not its uses: the next attempt will want the file
            raise
        with self._locks[name]:
            self._readers[name] -= 1
            self._uses[name] -= 1
            # A finished output file that turned out damaged is read for as well, and was not counted among the uses.
            if self._folder is not None and self._uses[name] <= 0 and not self._readers[name]:
                path.unlink(missing_ok=True)
                del self._here[name]

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        model = self._model
        assert model.repo is not None, "only models of the Hub lack files"
        where: dict[str, Any] = {} if self._folder is None else {"local_dir": self._folder}
        for attempt in range(TRIES):
            try:
                with explained(model.repo):
                    bar = _bar_that_ends(self._stopped)
                    return Path(hf_hub_download(model.repo, name, revision=model.commit, tqdm_class=bar, **where))
            except CheckpointError as error:
                if self._stopped.is_set():
                    raise Stopped from error
                if attempt < TRIES - 1 and is_transient(error.__cause__):
                    time.sleep(2**attempt)
                    continue
                raise ExportError(f"{name}: {error} Finished shards are kept; run the same command again.") from error
        raise AssertionError("the last try returns or raises")


def _bar_that_ends(stopped: threading.Event) -> type[Any]:
    """The progress bar of huggingface_hub, which ends the download that it counts when ``stopped`` is set.

    There is no other way into a download: it waits for nothing but the next bytes, and a file takes minutes.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise Stopped
            return super().update(n)

    return Bar


def _delete_useless(folder: Path, *, wanted: Container[str]) -> None:
    """Delete what a killed attempt left and this one will not read: halves of downloads, files that nobody wants."""
    for path in folder.rglob(UNFINISHED):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)


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
