"""Which bytes of the source become which tensor of the pruned checkpoint. Pure arithmetic on headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moeprune.anatomy.stored import AllExperts, OneExpert, Role
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` to ``end`` of ``file``."""

    file: Path
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the pruned checkpoint and where its bytes come from.

    Attributes:
        name: Its key in the pruned checkpoint.
        source: The stored tensor it is made of.
        shape: Its shape; the dtype is the source's.
        keep: Kept expert ids along ``dim`` if it is a slice, else None: the source's bytes as they are.
        dim: The expert axis of a slice.
    """

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    keep: tuple[int, ...] | None = None
    dim: int = 0

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        if self.keep is None:
            return self.source.num_bytes
        return self.source.num_bytes // self.source.shape[self.dim] * len(self.keep)

    def ranges(self) -> Iterator[ByteRange]:
        """The source's byte ranges, in the order in which they are written."""
        source = self.source
        if self.keep is None:
            yield ByteRange(source.file, source.start, source.end)
            return
        outer, experts = prod(source.shape[: self.dim]), source.shape[self.dim]
        stride = source.num_bytes // (outer * experts)
        for row in range(outer):
            base = source.start + row * experts * stride
            for first, last in _runs(self.keep):
                yield ByteRange(source.file, base + first * stride, base + (last + 1) * stride)


def plan_outputs(
    tensors: Mapping[str, TensorInfo], *, roles: Mapping[str, Role], keep: Mapping[str, Sequence[int]]
) -> dict[Path, list[OutputTensor]]:
    """Every tensor of the pruned checkpoint, by source shard, in the order of the source's bytes.

    Args:
        tensors: The source's tensors.
        roles: Which of them depend on experts.
        keep: Kept expert ids by layer, ascending.

    Returns:
        Shards of which nothing is left are absent.
    """
    position = {layer: {expert: new for new, expert in enumerate(ids)} for layer, ids in keep.items()}
    outputs: dict[Path, list[OutputTensor]] = {}
    for key, info in tensors.items():
        role = roles.get(key)
        if isinstance(role, OneExpert):
            new = position[role.layer].get(role.expert)
            if new is None:
                continue
            output = OutputTensor(role.renumbered(key, new), info, info.shape)
        elif isinstance(role, AllExperts):
            output = _sliced(key, info, role.dim, tuple(keep[role.layer]))
        else:
            output = OutputTensor(key, info, info.shape)
        outputs.setdefault(info.file, []).append(output)
    return outputs


def _sliced(key: str, info: TensorInfo, dim: int, keep: tuple[int, ...]) -> OutputTensor:
    if len(keep) == info.shape[dim]:
        return OutputTensor(key, info, info.shape)
    if info.num_bytes % prod(info.shape[: dim + 1]):
        raise UnsupportedModelError(f"{info.file}: an expert of {key!r} ({info.dtype}) is not a whole number of bytes.")
    return OutputTensor(key, info, (*info.shape[:dim], len(keep), *info.shape[dim + 1 :]), keep, dim)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last id of each run of consecutive ids: (0, 1, 2, 5) -> (0, 2), (5, 5)."""
    first = last = ids[0]
    for expert in ids[1:]:
        if expert != last + 1:
            yield first, last
            first = expert
        last = expert
    yield first, last
