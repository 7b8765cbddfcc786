"""Write the safetensors files of a pruned checkpoint, several at once. Memory does not grow with the model."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from moeprune.checkpoint.folder import INDEX_NAME
from moeprune.errors import ExportError
from moeprune.export.copying import HASH, Appender, Locate, Progress, hash_file
from moeprune.export.journal import Journal
from moeprune.export.layout import Shard
from moeprune.export.slices import ByteRange, OutputTensor
from moeprune.export.sources import LocalSources, Sources, Stopped
from moeprune.files import write_json

MAX_DEFAULT_JOBS = 4
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


def default_jobs() -> int:
    """Shards written at once: one for each processor, at most 4, beyond which disks rarely get faster."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_DEFAULT_JOBS, usable)


def write_shards(
    shards: Sequence[Shard],
    *,
    folder: Path,
    journal: Journal,
    sources: Sources | None = None,
    jobs: int | None = None,
    link: bool = False,
    progress: Progress = lambda count: None,
) -> None:
    """Write all shards, and enter each into the journal when it is complete.

    Shards that the journal has already are hashed, and written again only if they are damaged.

    Args:
        shards: What to write (:func:`moeprune.export.layout.lay_out`).
        folder: Existing folder to write to.
        journal: The finished shards of an earlier attempt; gets those of this one.
        sources: Gives the files to read; by default they are where the shards say.
        jobs: Shards written at once; by default :func:`default_jobs`.
        link: Hard link files that are wanted as they are, where the file system can.
        progress: Called with the number of bytes done since the last call; never by two threads at once.

    Raises:
        ExportError: If a source file changes size while it is read or cannot be downloaded, or the disk fills up.
    """
    work = _Work(folder, journal, sources or LocalSources(), link, _Turns(progress))
    with ThreadPoolExecutor(max_workers=max(1, jobs or default_jobs())) as pool:
        futures = [pool.submit(work.finish, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                with suppress(Stopped):
                    future.result()
        except OSError as error:
            work.stop()
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise ExportError(f"{what}. Finished shards are kept; run the same command again.") from error
        except BaseException:
            work.stop()
            raise


def write_index(
    shards: Sequence[Shard],
    *,
    folder: Path,
    metadata: Any = None,
    num_parameters: int | None = None,
) -> None:
    """Write the index of all shards; none is needed if there is only one.

    Args:
        shards: The checkpoint's files.
        folder: Where to write.
        metadata: That of the source's index, carried over but for the counts.
        num_parameters: Replaces ``total_parameters``, if the source's index has it.
    """
    if len(shards) < 2:
        return
    facts = {
        **(metadata if isinstance(metadata, dict) else {}),
        "total_size": sum(shard.data_bytes for shard in shards),
    }
    if "total_parameters" in facts and num_parameters is not None:
        facts["total_parameters"] = num_parameters
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    write_json(folder / INDEX_NAME, {"metadata": facts, "weight_map": dict(sorted(weight_map.items()))})


class _Work:
    """What all threads need to finish a shard."""

    def __init__(self, folder: Path, journal: Journal, sources: Sources, link: bool, progress: _Turns) -> None:
        self.folder, self.journal, self.sources, self.link, self.progress = folder, journal, sources, link, progress

    def finish(self, shard: Shard) -> None:
        """Have the shard complete and entered; an error stops all others."""
        self.progress(0)
        try:
            self._finish(shard)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """After an error, make all end at their next report or download instead of finishing gigabytes."""
        self.progress.stop()
        self.sources.stop()

    def _finish(self, shard: Shard) -> None:
        path, entry = self.folder / shard.name, self.journal.finished.get(shard.name)
        if entry is not None:
            if hash_file(path, progress=self.progress) == entry[HASH]:
                return
            self.progress(-shard.num_bytes)
            self.journal.forget(shard.name)
        path.unlink(missing_ok=True)
        with ExitStack() as stack:
            located = {}

            def locate(file: Path) -> Path:
                if file not in located:
                    located[file] = stack.enter_context(self.sources.open(file))
                return located[file]

            linked = self.link and shard.untouched is not None and _link(locate(shard.untouched), path)
            digest = (
                hash_file(path, progress=self.progress) if linked else _write_shard(shard, path, locate, self.progress)
            )
        self.journal.enter(shard.name, num_bytes=shard.num_bytes, digest=digest)


def _link(source: Path, path: Path) -> bool:
    try:
        os.link(source.resolve(), path)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return False
    return True


def _write_shard(shard: Shard, path: Path, locate: Locate, progress: Progress) -> str:
    with Appender(path, size=shard.num_bytes, locate=locate, progress=progress) as target:
        target.write(shard.header)
        progress(len(shard.header))
        for are_ranges, parts in groupby(shard.parts(), key=lambda part: isinstance(part, ByteRange)):
            if are_ranges:
                target.copy(cast("Iterator[ByteRange]", parts))
            else:
                for tensor in cast("Iterator[OutputTensor]", parts):
                    target.write(_computed(tensor, target))
                    progress(tensor.num_bytes)
        assert target.position == shard.num_bytes, f"{path}: {target.position} bytes, expected {shard.num_bytes}"
        return target.digest


def _computed(tensor: OutputTensor, target: Appender) -> bytes:
    source = tensor.source
    assert tensor.compute is not None, f"{tensor.name} is copied"
    data = tensor.compute(target.read(ByteRange(source.file, source.start, source.end)))
    assert len(data) == tensor.num_bytes, f"{tensor.name}: {len(data)} bytes, expected {tensor.num_bytes}"
    return data


class _Turns:
    """Progress reports of many threads one after the other, and the place where they are told to stop."""

    def __init__(self, report: Progress) -> None:
        self._report, self._lock, self._stopped = report, threading.Lock(), False

    def __call__(self, count: int) -> None:
        with self._lock:
            if self._stopped:
                raise Stopped
            self._report(count)

    def stop(self) -> None:
        self._stopped = True
