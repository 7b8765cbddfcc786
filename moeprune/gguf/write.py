"""Write a GGUF file by copying byte ranges. Memory does not grow with the model."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from moeprune.errors import ExportError
from moeprune.gguf.header import MAGIC, KeyValue
from moeprune.gguf.metadata import Entry, encode_string
from moeprune.gguf.slices import OutputTensor

# Fits the second-level cache: read and write touch memory once. copy_file_range would gain nothing: experts begin at
# multiples of 32 bytes, not of a page, so no page can be shared (CPU time of 2 GB: 0.5 to 0.7 s; with it, 0.9 to 1.1).
BUFFER_BYTES = 512 << 10

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
    with path.open("wb", buffering=0) as file, ExitStack() as stack:
        target = _Target(file, stack)
        target.write(MAGIC + struct.pack("<IQQ", version, len(tensors), len(metadata)))
        for entry in metadata:
            if isinstance(entry, KeyValue):
                target.copy(entry.file, entry.start, entry.end)
            else:
                target.write(entry)
        target.write(_infos(tensors, alignment))
        for tensor in tensors:
            target.pad(alignment)
            for start, end in tensor.ranges():
                target.copy(tensor.source.file, start, end, progress)
        target.pad(alignment)


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


class _Target:
    """The file in the making: appends bytes of its own and ranges of other files."""

    def __init__(self, file: BinaryIO, stack: ExitStack) -> None:
        self._file, self._stack = file, stack
        self._sources: dict[Path, int] = {}
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def pad(self, alignment: int) -> None:
        self.write(bytes(-self._file.tell() % alignment))

    def copy(self, source: Path, start: int, end: int, progress: Progress = lambda _: None) -> None:
        """Append bytes ``start`` to ``end`` of ``source``."""
        if source not in self._sources:
            self._sources[source] = self._stack.enter_context(source.open("rb")).fileno()
        while start < end:
            done = os.preadv(self._sources[source], [self._buffer[: end - start]], start)
            if done == 0:
                raise ExportError(f"{source}: ends at byte {start}, expected {end}. Did another program write to it?")
            self.write(self._buffer[:done])
            start += done
            progress(done)
