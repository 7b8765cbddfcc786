"""Stored tensors read by their byte ranges, straight to where they are wanted.

Not through a memory map: its pages count as resident memory of the process until the system takes them back, beside the
tensors that they are copied to.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A stored tensor that has not been read, with the methods of a safetensors slice that transformers uses."""

    info: TensorInfo

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        if self.info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.info.file}: {self.info.name!r} has dtype {self.info.dtype}, unknown to torch."
            )
        return TORCH_DTYPES[self.info.dtype]

    def get_dtype(self) -> str:
        """The dtype in safetensors' spelling."""
        return self.info.dtype

    def get_shape(self) -> list[int]:
        """The shape."""
        return list(self.info.shape)

    def __getitem__(self, index: object) -> Tensor:
        assert index is Ellipsis, "a stored tensor is read as a whole"
        return self.read()

    def read(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """The tensor, in memory of its own.

        Args:
            dtype: What to convert it to.
            device: Where to put it.

        Raises:
            CheckpointError: If the file cannot be read or ends too early.
        """
        tensor = torch.empty(self.info.shape, dtype=self.dtype)
        read_into(tensor, self.info)
        return tensor.to(device=device, dtype=dtype)

    def read_to(self, place: Tensor) -> None:
        """Read the tensor to ``place``, a part of another one, converting it where the dtypes differ."""
        if place.device.type == "cpu" and place.dtype == self.dtype and place.is_contiguous():
            read_into(place, self.info)
        else:
            place.copy_(self.read())


def read_into(place: Tensor, info: TensorInfo) -> None:
    """Fill a contiguous tensor on the CPU with the bytes of a stored one of the same dtype and number of elements."""
    assert place.numel() * place.element_size() == info.num_bytes
    if not info.num_bytes:
        return
    view = bytes_of(place)
    try:
        with info.file.open("rb", buffering=0) as file:
            fill(file, view, info.start)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error.strerror}).") from error
    except EOFError as error:
        raise CheckpointError(f"{info.file}: ends inside {info.name!r}. Did another program write to it?") from error


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def fill(file: FileIO, view: memoryview, start: int) -> None:
    """Read ``len(view)`` bytes from ``start`` of an open file.

    Raises:
        EOFError: If there are not as many.
    """
    file.seek(start)
    while len(view):
        done = file.readinto(view)
        if not done:
            raise EOFError
        view = view[done:]
