"""The header of a safetensors file: which tensors lie in which bytes.

Format: 8 bytes little-endian length N, N bytes of JSON, then the data, to which all offsets are relative
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moeprune.errors import CheckpointError

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


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

    Args:
        path: The file.

    Returns:
        Its tensors in the order of their bytes, and its ``__metadata__``.

    Raises:
        CheckpointError: If the file is truncated, is not safetensors, or its offsets do not fit its shapes and size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({size} bytes, header length {length}). Download it again."
            )
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the safetensors header is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object but {type(entries).__name__}.")
    metadata = entries.pop("__metadata__", None) or {}
    begin = 8 + length
    tensors = sorted(
        (_tensor_info(name, entry, path, begin, size) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    for before, after in pairwise(tensors):
        if after.start < before.end:
            raise CheckpointError(f"{path}: tensors {before.name!r} and {after.name!r} overlap.")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor_info(name: str, entry: dict[str, Any], path: Path, begin: int, size: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        start, end = (begin + int(offset) for offset in entry["data_offsets"])
        if min(shape, default=0) < 0:
            raise ValueError("negative size")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name!r} is malformed: {entry!r}.") from error
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}. Known: {sorted(DTYPE_BITS)}.")
    info = TensorInfo(name, dtype, shape, path, start, end)
    if not begin <= start <= end <= size:
        raise CheckpointError(f"{path}: tensor {name!r} ends at byte {end}, the file at {size}. Download it again.")
    if info.numel * DTYPE_BITS[dtype] != info.num_bytes * 8:
        raise CheckpointError(f"{path}: tensor {name!r}, {dtype} {list(shape)}, takes {info.num_bytes} bytes.")
    return info


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
