"""The folder that an export makes: whether it may, whether it fits, what else goes in, and the last step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from moeprune.checkpoint.folder import INDEX_NAME
from moeprune.errors import ExportError
from moeprune.export.copying import is_sparse, segments
from moeprune.export.journal import JOURNAL, clear
from moeprune.export.layout import Shard, bytes_by_source
from moeprune.format import size

MANIFEST = "moeprune.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
WRITTEN_HERE = {"config.json", "README.md", INDEX_NAME, MANIFEST}


def partial_of(out: Path) -> Path:
    """The folder in which ``out`` is made; where ``out`` is a link, beside the folder that it leads to."""
    resolved = out.resolve()
    return resolved.with_name(f"{resolved.name}.partial")


def check_target(out: Path, *, source: Path, force: bool) -> None:
    """Refuse to overwrite anything that was not asked for.

    Raises:
        ExportError: If ``out`` exists without ``force``, or is not an export, or holds the source or the current
            folder, or cannot be made, or if something else is where an export works.
    """
    resolved = out.resolve()
    parent = existing_parent(resolved.parent)
    if source.resolve().is_relative_to(resolved) or resolved.is_relative_to(source.resolve()):
        raise ExportError(f"{out}: lies in or around the source {source}. Choose another folder.")
    if Path.cwd().is_relative_to(resolved):
        raise ExportError(f"{out}: is the current folder or around it. Choose another folder.")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"{out}: cannot be made, since {parent} is no folder that may be written to. Choose another.")
    if out.exists():
        if not force:
            raise ExportError(f"{out}: exists. Choose another folder, or replace it with --force.")
        if not _is_empty_or_marked(out, MANIFEST):
            raise ExportError(
                f"{out}: --force replaces only checkpoints that moeprune wrote, and this is not one. Delete it."
            )
    for path, mark in ((partial_of(out), JOURNAL), (_replaced_of(out), MANIFEST)):
        if os.path.lexists(path) and (path.is_symlink() or not _is_empty_or_marked(path, mark)):
            raise ExportError(
                f"{path}: an export to {out} works there, and this is something else. Rename or delete it."
            )


def _is_empty_or_marked(folder: Path, mark: str) -> bool:
    """Whether it is a folder that an export left: with the file ``mark``, or with one that was to become it."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return not names or any(name == mark or fnmatch(name, f".{mark}.*.tmp") for name in names)


def other_files(folder: Path) -> Iterator[Path]:
    """Files that belong to the model and hold no weights: tokenizer, templates, generation config, code, licence.

    Hidden files, and folders that hold weights in another format (``original/``, ``onnx/``), are left out.
    """
    with_weights = {
        path.relative_to(folder).parts[0]
        for path in folder.glob("*/**/*")
        if path.suffix in WEIGHT_SUFFIXES and len(path.relative_to(folder).parts) > 1
    }
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        weights = path.suffix in WEIGHT_SUFFIXES or relative.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights and relative.parts[0] not in with_weights | WRITTEN_HERE:
            yield relative


def check_other_files(source: Path) -> None:
    """Refuse a source of which :func:`copy_other_files` could not copy all.

    Raises:
        ExportError: If one of :func:`other_files` may not be read.
    """
    for relative in other_files(source):
        if not os.access(source / relative, os.R_OK):
            raise ExportError(f"{source / relative}: may not be read. Change its permissions, or take it away.")


def copy_other_files(source: Path, target: Path) -> None:
    """Copy :func:`other_files` of one folder to another, as files even where the source has links."""
    for relative in other_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / relative, target / relative)


def bytes_to_store(shards: Iterable[Shard], *, missing: Collection[str] = (), linked_in: Path | None = None) -> int:
    """Bytes of tensors that files will take on disk: what the source does not store, the target will not either.

    Args:
        shards: The files.
        missing: Names of source files that are not here yet.
        linked_in: Where the files go, if those that stay as they are become hard links, which take no room.
    """
    device = None if linked_in is None else existing_parent(linked_in).stat().st_dev
    copied = [
        shard
        for shard in shards
        if shard.untouched is None or shard.untouched.name in missing or shard.untouched.stat().st_dev != device
    ]
    total = 0
    for file, wanted in bytes_by_source(copied).items():
        sparse = file.name not in missing and is_sparse(file.stat())
        total += min(wanted, _stored(file)) if sparse else wanted
    return total


def check_space(out: Path, needed: int, *, partial: Path, keep: Collection[str] = ()) -> None:
    """Refuse an export that the disk cannot hold.

    Args:
        out: Where it goes.
        needed: Bytes still to be written.
        partial: Folder of an earlier attempt, of which all but ``keep`` will be deleted, or is part of ``needed``.
        keep: Files in it that stay.

    Raises:
        ExportError: If less is free.
    """
    free = shutil.disk_usage(existing_parent(out)).free
    kept = {partial / name for name in keep}
    free += sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file() and path not in kept)
    if free < needed:
        raise ExportError(f"{out}: needs {size(needed)}, only {size(free)} are free on that disk.")


def existing_parent(path: Path) -> Path:
    """The folder itself or the nearest one above that exists."""
    return next(parent for parent in [path.resolve(), *path.resolve().parents] if parent.exists())


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the complete folder to its name; what was there is deleted last."""
    target, replaced = out.resolve(), _replaced_of(out)
    if target.exists():
        _delete(replaced)
        target.rename(replaced)
    partial.rename(target)
    (target / JOURNAL).unlink()
    _delete(replaced)


def _replaced_of(out: Path) -> Path:
    """Where what ``out`` was is kept until its successor is in place."""
    resolved = out.resolve()
    return resolved.with_name(f"{resolved.name}.replaced")


def _delete(replaced: Path) -> None:
    """Delete a replaced export, its manifest last: until then the next export knows it as one."""
    with suppress(OSError):  # missing, or in use on a network file system: the next export tries again
        clear(replaced, keep=[MANIFEST])
        shutil.rmtree(replaced)


def _stored(file: Path) -> int:
    fd = os.open(file, os.O_RDONLY)
    try:
        return sum(end - start for start, end, stored in segments(fd, 0, os.fstat(fd).st_size) if stored)
    finally:
        os.close(fd)
