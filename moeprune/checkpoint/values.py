"""Look at stored values without a model: are they numbers at all?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from io import FileIO

import numpy as np

from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import CheckpointError

CHUNK_BYTES = 4 << 20  # a chunk and its mask stay in the processor's cache

# dtype -> (numpy type of the same width, mask, value of the masked bits in everything that is infinite or no number).
# IEEE and BF16: all exponent bits set. The 8-bit formats of OCP have no infinity (E4M3, E8M0), those of FNUZ one NaN.
NOT_FINITE = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
}


WITH_INFINITY = ("F64", "F32", "BF16", "F16", "F8_E5M2")


def check_finite(
    tensors: Mapping[str, TensorInfo], *, expert_dims: Mapping[str, int], biases: Collection[str] = ()
) -> None:
    """Refuse tensors with a value that is NaN or infinite: one such row and a router sends tokens anywhere.

    Only the tensors named are read, a few megabytes at a time. Integers and formats of less than a byte always pass:
    they have no such values.

    Args:
        tensors: The tensors of a checkpoint, by stored key.
        expert_dims: The keys to check, such as router weights and biases, with the axis that counts the experts.
        biases: Those in which -inf is no damage: added to the score of an expert, it keeps tokens from it.

    Raises:
        CheckpointError: Naming tensor, expert and position of the first such value; or if a file cannot be read.
    """
    for key, dim in expert_dims.items():
        info = tensors[key]
        try:
            position = _first_not_finite(info, may_mask=key in biases)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror}).") from error
        if position is not None:
            index = tuple(int(i) for i in np.unravel_index(position, info.shape))
            where = f"expert {index[dim]} (element {list(index)})" if index else "its value"
            raise CheckpointError(
                f"{info.file}: {where} of {key!r} is not a finite number. The model is damaged; download it again, or "
                "save it anew from where it was trained."
            )


def masked_experts(info: TensorInfo) -> frozenset[int]:
    """Positions of -inf in a stored bias with one value an expert: the experts that no token is sent to."""
    if info.dtype not in WITH_INFINITY:
        return frozenset()
    name, _, pattern = NOT_FINITE[info.dtype]
    words = np.empty(info.numel, np.dtype(name))
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        _fill(file, words, info)
    return frozenset(np.flatnonzero(words == _negative(words.dtype, pattern)).tolist())


def _negative(dtype: np.dtype, pattern: int) -> np.generic:
    """The bits of a negative number of which ``pattern`` are those of the same positive one."""
    return dtype.type(pattern | 1 << (8 * dtype.itemsize - 1))


def _first_not_finite(info: TensorInfo, *, may_mask: bool) -> int | None:
    """Position of the first element that is NaN or infinite, in row-major order; -inf passes where it ``may_mask``."""
    if info.dtype not in NOT_FINITE:
        return None
    name, mask, pattern = NOT_FINITE[info.dtype]
    dtype = np.dtype(name)
    passes = _negative(dtype, pattern) if may_mask and info.dtype in WITH_INFINITY else None
    mask, pattern = dtype.type(mask), dtype.type(pattern)
    words = info.num_bytes // dtype.itemsize
    buffer = np.empty(min(words, CHUNK_BYTES // dtype.itemsize), dtype)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        for first in range(0, words, len(buffer) or 1):
            chunk = buffer[: words - first]
            _fill(file, chunk, info)
            if passes is not None:
                chunk[chunk == passes] = 0
            found = np.flatnonzero(np.bitwise_and(chunk, mask, out=chunk) == pattern)
            if len(found):
                return (first + int(found[0])) * info.numel // words  # two words make a complex number
    return None


def _fill(file: FileIO, chunk: np.ndarray, info: TensorInfo) -> None:
    view = chunk.data.cast("B")
    while len(view):
        done = file.readinto(view)
        if not done:
            raise CheckpointError(f"{info.file}: ends inside {info.name!r}. Did another program write to it?")
        view = view[done:]
