"""The header of a safetensors file: which tensors lie in which bytes.

Format: 8 bytes little-endian length N, N bytes of JSON, then the data, to which all offsets are relative
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moeprune.errors import CheckpointError
from moeprune.files import parse_json, shorten

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
LIMIT = 1 << 64  # the library counts elements and bits in 64 bits and refuses what does not fit
OTHER_FORMATS = {
    b"version ": "a Git LFS pointer to the weights. Run `git lfs pull` in its folder",
    b"PK\x03\x04": "a pickle, which can run code when it is read. Convert it to safetensors",
    b"\x80\x02": "a pickle, which can run code when it is read. Convert it to safetensors",
    b"GGUF": "a GGUF file. Rename it to .gguf",
    b"<!": "a web page. Download it again",
    b"<html": "a web page. Download it again",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: bytes ``start`` to ``end`` (absolute) of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Whatever the safetensors library refuses is refused. So are three spellings that it takes: a tensor or a key of the
    metadata given twice (it takes the last), an entry as an array without field names, and a dtype as an object.

    Args:
        path: The file.

    Returns:
        Its tensors in the order of their bytes, and its ``__metadata__``.

    Raises:
        CheckpointError: If the file cannot be read, is truncated, is not safetensors, or its tensors do not fill it
            exactly, one after the other.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = _read_text(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        entries = parse_json(text, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object but {type(entries).__name__}.")
    metadata = _checked_metadata(path, entries.pop("__metadata__", None))
    begin = 8 + len(text)
    tensors = [_tensor_info(name, entry, path, begin) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(path, tensors, begin, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _read_text(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    text = file.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size - 8) else b""
    if text and len(text) == length:
        return text
    for magic, what in OTHER_FORMATS.items():  # looked for only now: a length may begin with the same bytes
        if prefix.startswith(magic):
            raise CheckpointError(f"{path}: not safetensors but {what}.")
    if MAX_HEADER_BYTES < length <= size - 8:
        raise CheckpointError(
            f"{path}: has a header of {length} bytes; the safetensors library reads at most {MAX_HEADER_BYTES}."
        )
    raise CheckpointError(
        f"{path}: not a complete safetensors file ({size} bytes, header length {length}). Download it again."
    )


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: expected texts by name as __metadata__, got {shorten(metadata)}.")
    return metadata


def _tensor_info(name: str, entry: Any, path: Path, begin: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if _are_counts(
            [*shape, start, end]
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: the header entry of {shorten(name)} is malformed: {shorten(entry)}.")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: tensor {shorten(name)} has the unknown dtype {shorten(dtype)}. Known: {sorted(DTYPE_BITS)}."
        )
    if _num_bits(shape, DTYPE_BITS[dtype]) != (end - start) * 8:
        raise CheckpointError(
            f"{path}: tensor {shorten(name)}, {dtype} {shorten(shape)}, does not fit into bytes {start} to {end}."
        )
    return TensorInfo(name, dtype, tuple(shape), path, begin + start, begin + end)


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < LIMIT for value in values)  # a bool is no count


def _num_bits(shape: Sequence[int], bits: int) -> int | None:
    count = 1
    for size in [*shape, bits]:  # in order: a zero at the end does not undo an overflow
        count *= size
        if count >= LIMIT:
            return None
    return count


def _check_layout(path: Path, tensors: Sequence[TensorInfo], begin: int, size: int) -> None:
    """Refuse overlaps, holes and bytes after the last tensor, as the safetensors library does."""
    position, before = begin, ""
    for tensor in tensors:
        if tensor.start < position:
            raise CheckpointError(f"{path}: tensors {shorten(before)} and {shorten(tensor.name)} overlap.")
        if tensor.start > position:
            raise CheckpointError(
                f"{path}: bytes {position} to {tensor.start} before tensor {shorten(tensor.name)} belong to no tensor."
            )
        if tensor.end > size:
            raise CheckpointError(
                f"{path}: tensor {shorten(tensor.name)} ends at byte {tensor.end}, the file at {size}. "
                "Download it again."
            )
        position, before = tensor.end, tensor.name
    if position < size:
        raise CheckpointError(f"{path}: its tensors end at byte {position}, the file at {size}. Download it again.")


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file that holds ``tensors`` one after the other.

    Args:
        tensors: (name, dtype, shape, bytes) in the order in which their data will be written.
        metadata: The file's ``__metadata__``; left out where empty.

    Returns:
        Length and header, padded with spaces so that the data starts at a multiple of 8 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
