"""Write safetensors shards by copying byte ranges. Memory does not grow with the model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moeprune.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from moeprune.checkpoint.header import encode_header
from moeprune.errors import ExportError
from moeprune.export.slices import ByteRange, OutputTensor
from moeprune.files import write_json

CHUNK_BYTES = 8 << 20
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

Progress = Callable[[int], object]


def write_shards(
    outputs: Mapping[Path, Sequence[OutputTensor]],
    *,
    folder: Path,
    metadata: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> None:
    """Write all shards and, if there is more than one, their index.

    Args:
        outputs: Tensors by source shard (:func:`moeprune.export.slices.plan_outputs`).
        folder: Existing folder to write to.
        metadata: ``__metadata__`` of each source shard by file name, copied.
        progress: Called with the number of bytes written since the last call.

    Raises:
        ExportError: If a source file changes size while it is read.
    """
    weight_map: dict[str, str] = {}
    for number, (source, tensors) in enumerate(outputs.items(), start=1):
        name = SINGLE_NAME if len(outputs) == 1 else f"model-{number:05d}-of-{len(outputs):05d}.safetensors"
        _write_shard(folder / name, tensors, dict(metadata[source.name]), progress)
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), name)
    if len(outputs) > 1:
        total = sum(tensor.num_bytes for tensors in outputs.values() for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def _write_shard(path: Path, tensors: Sequence[OutputTensor], metadata: dict[str, str], progress: Progress) -> None:
    header = encode_header(
        ((tensor.name, tensor.source.dtype, tensor.shape, tensor.num_bytes) for tensor in tensors), metadata
    )
    with path.open("wb") as target:
        target.write(header)
        target.flush()
        for piece in _joined(part for tensor in tensors for part in tensor.ranges()):
            with piece.file.open("rb") as source:
                _copy(source.fileno(), target.fileno(), piece, progress)
    expected = len(header) + sum(tensor.num_bytes for tensor in tensors)
    assert path.stat().st_size == expected, f"{path} has {path.stat().st_size} bytes, expected {expected}"


def _joined(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Neighbouring ranges as one: experts that stay side by side are copied in one go."""
    pending: ByteRange | None = None
    for item in ranges:
        if pending is not None and pending.file == item.file and pending.end == item.start:
            pending = ByteRange(pending.file, pending.start, item.end)
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending


def _copy(source: int, target: int, piece: ByteRange, progress: Progress) -> None:
    """Append ``piece`` to the target: inside the kernel where the file systems allow it, else through a buffer."""
    offset, in_kernel = piece.start, True
    while offset < piece.end:
        wanted = min(CHUNK_BYTES, piece.end - offset)
        try:
            done = (
                os.copy_file_range(source, target, wanted, offset)
                if in_kernel
                else _through(source, target, wanted, offset)
            )
        except OSError as error:
            if not in_kernel or error.errno not in NO_KERNEL_COPY:
                raise
            in_kernel = False
            continue
        if done == 0:
            raise ExportError(
                f"{piece.file}: ends at byte {offset}, expected {piece.end}. Did another program write to it?"
            )
        offset += done
        progress(done)


def _through(source: int, target: int, wanted: int, offset: int) -> int:
    data = memoryview(os.pread(source, wanted, offset))
    done = 0
    while done < len(data):
        done += os.write(target, data[done:])
    return done
