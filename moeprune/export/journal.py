"""What a killed export has finished, so that the next one goes on from there."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moeprune import __version__
from moeprune.checkpoint.folder import Checkpoint
from moeprune.export.copying import HASH
from moeprune.export.layout import Shard
from moeprune.files import read_json, sha256_json, write_json
from moeprune.plan.plan import Plan

JOURNAL = ".moeprune-export.json"
FORMAT = 1


class Journal:
    """The finished shards of one export, in a file beside them.

    A shard is entered with its size and hash when it is complete. After a kill the system has all of it; after a power
    cut some of it may be lost, which the hash shows. So nothing waits for the disk.

    Args:
        folder: Where the shards are.
        job: What is exported (:func:`job_of`): entries of another job are not believed.
        finished: Size and hash by shard name, from an earlier attempt.
    """

    def __init__(self, folder: Path, *, job: str, finished: dict[str, dict[str, Any]] | None = None) -> None:
        self.finished = dict(finished or {})
        self._path, self._job, self._lock = folder / JOURNAL, job, threading.Lock()
        self._write()

    def enter(self, name: str, *, num_bytes: int, digest: str) -> None:
        """Record that the shard is complete."""
        with self._lock:
            self.finished[name] = {"bytes": num_bytes, HASH: digest}
            self._write()

    def forget(self, name: str) -> None:
        """Leave a shard out that turned out to be damaged."""
        with self._lock:
            self.finished.pop(name, None)

    def _write(self) -> None:
        write_json(self._path, {"format": FORMAT, "job": self._job, "shards": self.finished})


def job_of(checkpoint: Checkpoint, *, plan: Plan, shards: Iterable[Shard], commit: str | None, link: bool) -> str:
    """Hash of everything that the bytes of the shards depend on, and of whether they may be links.

    The source's files count with size and time of change, because its fingerprint samples their data only; those of a
    commit on the Hub cannot change.
    """
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.shards]
    return sha256_json({
        "moeprune": __version__,
        "plan": plan.sha256,
        "link": link,
        "source": commit or [str(checkpoint.path.resolve()), files],
        "shards": [
            [shard.name, hashlib.sha256(shard.header).hexdigest(), shard.num_bytes, [file.name for file in shard.files]]
            for shard in shards
        ],
    })  # fmt: skip


def read_finished(folder: Path, *, job: str, shards: Sequence[Shard]) -> dict[str, dict[str, Any]] | None:
    """What an earlier attempt at this very export has finished, by name and size; hashes are compared when it goes on.

    Args:
        folder: Where that attempt wrote.
        job: What is exported now.
        shards: The shards of this export.

    Returns:
        None if there was no such attempt.
    """
    try:
        journal = read_json(folder / JOURNAL)
        if journal["format"] != FORMAT or journal["job"] != job:
            return None
        entered = {str(name): {"bytes": int(e["bytes"]), HASH: str(e[HASH])} for name, e in journal["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, torn by a power cut, or not ours
        return None
    sizes = {shard.name: shard.num_bytes for shard in shards}
    return {
        name: entry
        for name, entry in entered.items()
        if (folder / name).is_file() and entry["bytes"] == sizes.get(name) == (folder / name).stat().st_size
    }


def clear(folder: Path, *, keep: Iterable[str]) -> None:
    """Delete everything in a folder but ``keep``."""
    kept = set(keep)
    for path in folder.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
