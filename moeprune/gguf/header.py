"""The header of a GGUF file: its metadata and which tensors lie in which bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is parsed here, and not by ``gguf.GGUFReader``,
because an export copies metadata as bytes: that reader makes an array object of every token and merge (9 s and 480 MB
for a vocabulary of 152k) and forgets the element type of an empty array.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.gguf.types import GgmlType, ggml_types

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 differs from 2 in that it may be big-endian
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NESTING = 4
MAX_DECODED = 4096  # longer arrays hold a vocabulary, and nothing here asks for one
MAX_TEXT = 1 << 22

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = bool | int | float | str | tuple[bool | int | float, ...] | None


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata entry: bytes ``start`` to ``end`` of ``file``, key and type included.

    Attributes:
        key: Its name, unique in the file.
        kind: Number of its type (``gguf.GGUFValueType``).
        element: Number of the element type of an array, else None.
        value: A scalar, a string or a short array of numbers; None for what is too long or nested to be of use here.
        file: Where it is stored.
        start: First byte.
        end: Byte after the last.
    """

    key: str
    kind: int
    element: int | None
    value: Value
    file: Path
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor.

    Attributes:
        name: Such as ``blk.0.ffn_gate_exps.weight``.
        ne: Its dimensions in ggml's order, innermost first: [in, out, experts].
        kind: How it is stored.
        file: Where it is stored.
        start: First byte, absolute.
        num_bytes: Stored size.
    """

    name: str
    ne: tuple[int, ...]
    kind: GgmlType
    file: Path
    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Byte after the last."""
        return self.start + self.num_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says.

    Attributes:
        version: Of the format.
        alignment: Tensor data starts at multiples of this many bytes.
        metadata: All entries by key, in order.
        tensors: All tensors, in the order of the header.
    """

    version: int
    alignment: int
    metadata: dict[str, KeyValue]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of one file. No tensor data is touched.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is truncated, is not GGUF, is big-endian, or contradicts itself.
        UnsupportedModelError: If a tensor has a type that the installed gguf package does not know.
    """
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path}: not a complete GGUF file ({path.stat().st_size} bytes). Download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        version, num_tensors, num_entries = _preamble(cursor)
        metadata: dict[str, KeyValue] = {}
        for _ in range(num_entries):
            entry = _key_value(cursor)
            if entry.key in metadata:
                raise CheckpointError(f"{path}: the metadata key {entry.key!r} is there twice.")
            metadata[entry.key] = entry
        alignment = _alignment(path, metadata)
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        begin = -(-cursor.position // alignment) * alignment
        tensors = tuple(_tensor(path, info, begin, alignment, len(data)) for info in infos)
    _check_tensors(path, tensors)
    return Header(version, alignment, metadata, tensors)


class _Cursor:
    """A position in a file, and reads that never go past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def skip(self, num_bytes: int) -> int:
        """Move on; return where the skipped bytes start."""
        start = self.position
        if num_bytes > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: damaged or incomplete: {num_bytes} bytes are announced at byte {start}, the file ends "
                f"at {len(self.data)}. Download it again."
            )
        self.position = start + num_bytes
        return start

    def numbers(self, code: str, count: int = 1) -> tuple[bool | int | float, ...]:
        start = self.skip(count * struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def u32(self) -> int:
        return struct.unpack_from("<I", self.data, self.skip(4))[0]

    def u64(self) -> int:
        return struct.unpack_from("<Q", self.data, self.skip(8))[0]

    def text(self) -> str | None:
        """A string, or None if it is too long to be of use."""
        length = self.u64()
        start = self.skip(length)
        if length > MAX_TEXT:
            return None
        return bytes(self.data[start : start + length]).decode("utf-8", errors="replace")

    def name(self, what: str) -> str:
        start = self.position
        text = self.text()
        if not text or "\ufffd" in text or "\0" in text:
            raise CheckpointError(f"{self.path}: the name of {what} at byte {start} is not text. Download it again.")
        return text

    def check_count(self, count: int, least: int, what: str) -> int:
        """Refuse a count that the rest of the file cannot hold, before a loop runs that long."""
        if count * least > len(self.data) - self.position:
            raise CheckpointError(
                f"{self.path}: damaged or incomplete: {count} {what} are announced at byte {self.position}, the file "
                f"ends at {len(self.data)}. Download it again."
            )
        return count


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    path, magic = cursor.path, bytes(cursor.data[:4])
    if magic != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}.")
    cursor.skip(4)
    version = cursor.u32()
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{path}: a big-endian GGUF file. Convert it first: gguf-convert-endian {path.name} little (it comes "
                "with the gguf package)."
            )
        raise CheckpointError(
            f"{path}: GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}. Convert the model again with "
            "a current llama.cpp."
        )
    num_tensors = cursor.check_count(cursor.u64(), 24, "tensors")
    return version, num_tensors, cursor.check_count(cursor.u64(), 13, "metadata entries")


def _key_value(cursor: _Cursor) -> KeyValue:
    start = cursor.position
    key = cursor.name("a metadata entry")
    kind = cursor.u32()
    element: int | None = None
    value: Value = None
    if kind == STRING:
        value = cursor.text()
    elif kind == ARRAY:
        element, value = _array(cursor, key, depth=0)
    elif kind in SCALARS:
        (value,) = cursor.numbers(SCALARS[kind])
    else:
        raise CheckpointError(f"{cursor.path}: metadata {key!r} has the unknown type {kind}. Download it again.")
    return KeyValue(key, kind, element, value, cursor.path, start, cursor.position)


def _array(cursor: _Cursor, key: str, *, depth: int) -> tuple[int, tuple[bool | int | float, ...] | None]:
    element, count = cursor.u32(), cursor.u64()
    if element in SCALARS:
        code = SCALARS[element]
        if count <= MAX_DECODED:
            return element, cursor.numbers(code, count)
        cursor.skip(count * struct.calcsize(f"<{code}"))
    elif element == STRING:
        for _ in range(cursor.check_count(count, 8, "strings")):
            cursor.skip(cursor.u64())
    elif element == ARRAY and depth < MAX_NESTING:
        for _ in range(cursor.check_count(count, 12, "arrays")):
            _array(cursor, key, depth=depth + 1)
    else:
        raise CheckpointError(f"{cursor.path}: metadata {key!r} is an array of unknown type {element}.")
    return element, None


def _alignment(path: Path, metadata: dict[str, KeyValue]) -> int:
    entry = metadata.get("general.alignment")
    alignment = DEFAULT_ALIGNMENT if entry is None else entry.value
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a power of two.")
    return alignment


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name("a tensor")
    num_dims = cursor.u32()
    if num_dims > MAX_DIMS:
        raise CheckpointError(f"{cursor.path}: tensor {name!r} has {num_dims} dimensions, at most {MAX_DIMS} can be.")
    ne = tuple(cursor.u64() for _ in range(num_dims))
    return name, ne, cursor.u32(), cursor.u64()


def _tensor(
    path: Path, info: tuple[str, tuple[int, ...], int, int], begin: int, alignment: int, size: int
) -> GgufTensor:
    name, ne, number, offset = info
    kind = ggml_types().get(number)
    if kind is None:
        raise UnsupportedModelError(
            f"{path}: tensor {name!r} has ggml type {number}, which the installed gguf package does not know. Try: "
            "pip install -U gguf"
        )
    row = ne[0] if ne else 1
    if row % kind.block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has rows of {row}, not a multiple of the {kind.block} elements in a block of "
            f"{kind.name}."
        )
    tensor = GgufTensor(name, ne, kind, path, begin + offset, prod(ne) // kind.block * kind.num_bytes)
    if offset % alignment:
        raise CheckpointError(f"{path}: tensor {name!r} starts at {offset}, not a multiple of {alignment}.")
    if tensor.end > size:
        raise CheckpointError(
            f"{path}: tensor {name!r} ends at byte {tensor.end}, the file at {size}. Download it again."
        )
    return tensor


def _check_tensors(path: Path, tensors: tuple[GgufTensor, ...]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        names = [tensor.name for tensor in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: tensor {twice!r} is stored twice.")
    for before, after in pairwise(sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))):
        if after.start < before.end:
            raise CheckpointError(f"{path}: tensors {before.name!r} and {after.name!r} overlap.")
