"""Write a GGUF file by copying byte ranges. Memory does not grow with the model."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from moeprune.errors import ExportError
from moeprune.gguf.header import MAGIC, KeyValue
from moeprune.gguf.metadata import Entry, encode_string
from moeprune.gguf.slices import OutputTensor

CHUNK_BYTES = 8 << 20

Progress = Callable[[int], object]


def write_gguf(
    path: Path,
    *,
    version: int,
    alignment: int,
    metadata: Sequence[Entry],
    tensors: Sequence[OutputTensor],
    progress: Progress,
) -> None:
    """Write header and data.

    Args:
        path: The file to make.
        version: Of the format.
        alignment: Each tensor's data starts at a multiple of it.
        metadata: Entries: new ones as bytes, others copied from where they are.
        tensors: What to write, in this order.
        progress: Called with the number of bytes of tensor data written since the last call.

    Raises:
        ExportError: If a source file ends too early while it is read.
    """
    with path.open("wb") as target, ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}

        def copy(source: Path, start: int, end: int, report: Progress = lambda _: None) -> None:
            if source not in opened:
                opened[source] = stack.enter_context(source.open("rb", buffering=0))
            for chunk in _chunks(opened[source], source, start, end):
                target.write(chunk)
                report(len(chunk))

        target.write(MAGIC + struct.pack("<IQQ", version, len(tensors), len(metadata)))
        for entry in metadata:
            if isinstance(entry, KeyValue):
                copy(entry.file, entry.start, entry.end)
            else:
                target.write(entry)
        target.write(_infos(tensors, alignment))
        for tensor in tensors:
            target.write(bytes(-target.tell() % alignment))
            for start, end in tensor.ranges():
                copy(tensor.source.file, start, end, progress)
        target.write(bytes(-target.tell() % alignment))


def data_size(tensors: Sequence[OutputTensor], alignment: int) -> int:
    """Bytes that the tensors take, each padded to the alignment."""
    return sum(-(-tensor.num_bytes // alignment) * alignment for tensor in tensors)


def _infos(tensors: Sequence[OutputTensor], alignment: int) -> bytes:
    infos, offset = bytearray(), 0
    for tensor in tensors:
        ne = tensor.ne
        infos += encode_string(tensor.name)
        infos += struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.source.kind.number, offset)
        offset += -(-tensor.num_bytes // alignment) * alignment
    return bytes(infos)


def _chunks(file: BinaryIO, path: Path, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        chunk = file.read(min(CHUNK_BYTES, end - start))
        if not chunk:
            raise ExportError(f"{path}: ends at byte {start}, expected {end}. Did another program write to it?")
        yield chunk
        start += len(chunk)
