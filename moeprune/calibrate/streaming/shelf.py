"""Where the outputs of layers are kept between layers: in memory, or in files."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.calibrate.streaming.stored import bytes_of, fill
from moeprune.calibrate.streaming.tree import mapped
from moeprune.errors import MoePruneError


class Shelf:
    """Keeps nests of tensors in the memory of the host, by name and batch."""

    def __init__(self) -> None:
        self._nests: dict[str, dict[int, Any]] = defaultdict(dict)
        self.table: dict[str, list[Any]] = {}

    def put(self, name: str, batch: int, nest: Any) -> None:
        """Keep a nest."""
        self._nests[name][batch] = mapped(nest, _compact)

    def get(self, name: str, batch: int, *, device: torch.device, last: bool) -> Any:
        """A nest that was kept.

        Args:
            name: Its name.
            batch: Its batch.
            device: Where its tensors go.
            last: Whether it is needed no more. Otherwise its tensors are copies: a layer may change its input in place.
        """
        nest = self._nests[name].pop(batch) if last else mapped(self._nests[name][batch], Tensor.clone)
        return mapped(nest, lambda tensor: tensor.to(device))

    def complete(self, name: str) -> None:
        """All batches of ``name`` have been put."""

    def drop(self, name: str) -> None:
        """Forget all batches of ``name``."""
        self._nests.pop(name, None)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in memory of the host that holds nothing but it."""
    tensor = tensor.cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


class DiskShelf(Shelf):
    """Keeps nests of tensors in a folder, one file a name.

    Args:
        folder: The folder; made if it is missing.
        table: What :attr:`table` was when the files were written, to go on with them.
    """

    def __init__(self, folder: Path, table: dict[str, list[Any]] | None = None):
        super().__init__()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MoePruneError(
                f"{folder}: no folder for hidden states can be made there ({error.strerror}). Give another with "
                "--offload-hidden."
            ) from error
        for file in folder.glob("*.bin"):
            if file.stem not in (table or {}):
                file.unlink()
        self._folder = folder
        self._open: dict[str, FileIO] = {}
        self.table = dict(table or {})

    @property
    def is_complete(self) -> bool:
        """Whether all files of the table are there as they were written."""
        return all(self._size(name) == max(map(end_of, codes), default=0) for name, codes in self.table.items())

    def _size(self, name: str) -> int:
        path = self._folder / f"{name}.bin"
        return path.stat().st_size if path.is_file() else -1

    def put(self, name: str, batch: int, nest: Any) -> None:
        """Append a nest to its file; batches come in order.

        Raises:
            MoePruneError: If the disk is full.
        """
        file = self._open.get(name)
        if file is None:
            file = self._open[name] = (self._folder / f"{name}.bin").open("wb+", buffering=0)
            self.table[name] = []
        assert len(self.table[name]) == batch, "batches are put in order"
        try:
            self.table[name].append(encode(nest, file))
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, name: str, batch: int, *, device: torch.device, last: bool) -> Any:
        """A nest, read anew."""
        file = self._open.get(name)
        if file is None:
            file = self._open[name] = (self._folder / f"{name}.bin").open("rb", buffering=0)
        return decode(self.table[name][batch], file, device)

    def complete(self, name: str) -> None:
        """Wait until a file is on the disk, so that a run that is killed later can go on from it."""
        if name in self._open:
            try:
                os.fsync(self._open[name].fileno())
            except OSError as error:
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> MoePruneError:
        return MoePruneError(
            f"{self._folder}: hidden states cannot be written ({error.strerror}). Give a folder on a larger disk."
        )

    def drop(self, name: str) -> None:
        """Delete a file."""
        if name in self._open:
            self._open.pop(name).close()
        self.table.pop(name, None)
        (self._folder / f"{name}.bin").unlink(missing_ok=True)


def encode(nest: Any, file: FileIO | None) -> Any:
    """A nest as JSON, its tensors by dtype, shape and place in ``file``, to which they are appended if it is given."""
    if isinstance(nest, Tensor):
        at = 0 if file is None else file.tell()
        if file is not None:
            view = bytes_of(nest.detach().cpu().contiguous())
            while len(view):
                view = view[file.write(view) :]
        return {"tensor": [str(nest.dtype).removeprefix("torch."), list(nest.shape), at]}
    if isinstance(nest, dict):
        return {"dict": [[key, encode(value, file)] for key, value in nest.items()]}
    if isinstance(nest, tuple | list):
        return {type(nest).__name__: [encode(value, file) for value in nest]}
    return {"value": nest}


def end_of(code: Any) -> int:
    """Where in the file the last tensor of an encoded nest ends."""
    ((kind, content),) = code.items()
    match kind:
        case "tensor":
            name, shape, start = content
            return start + math.prod(shape) * getattr(torch, name).itemsize
        case "dict":
            return max((end_of(value) for _, value in content), default=0)
        case "tuple" | "list":
            return max(map(end_of, content), default=0)
    return 0


def decode(code: Any, file: FileIO | None, device: torch.device) -> Any:
    """The nest that :func:`encode` gave; without ``file`` its tensors are on the meta device."""
    ((kind, content),) = code.items()
    match kind:
        case "tensor":
            name, shape, start = content
            dtype = getattr(torch, name)
            if file is None:
                return torch.empty(shape, dtype=dtype, device="meta")
            tensor = torch.empty(shape, dtype=dtype)
            fill(file, bytes_of(tensor), start)
            return tensor.to(device)
        case "dict":
            return {key: decode(value, file, device) for key, value in content}
        case "tuple" | "list":
            return (tuple if kind == "tuple" else list)(decode(value, file, device) for value in content)
    return content
