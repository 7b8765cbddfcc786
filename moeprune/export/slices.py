"""Which bytes of the source become which tensor of the pruned checkpoint. Pure arithmetic on headers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.anatomy.anatomy import kept_runs
from moeprune.anatomy.quirks.expert_ids import remap_stored_ids
from moeprune.anatomy.roles import AllExperts, ExpertIds, OneExpert, Role, Towers
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moeprune.plan.plan import Plan

Runs = tuple[tuple[int, int], ...]


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
        runs: If it is a slice, the entries along ``dim`` that stay, as runs start to stop: one list for all entries of
            the axes before ``dim``, or one for each. None: the source's bytes as they are.
        dim: The axis of a slice.
        compute: If its values change: the new bytes, given all bytes of the source.
    """

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    runs: tuple[Runs, ...] | None = None
    dim: int = 0
    compute: Callable[[bytes], bytes] | None = field(default=None, compare=False)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        if self.shape == self.source.shape:
            return self.source.num_bytes
        return self.source.num_bytes * prod(self.shape) // max(1, prod(self.source.shape))

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the source."""
        return self.runs is None and self.compute is None

    def ranges(self) -> Iterator[ByteRange]:
        """The source's byte ranges, in the order in which they are written; not for computed tensors."""
        assert self.compute is None, f"{self.name} is computed"
        source = self.source
        if self.runs is None:
            yield ByteRange(source.file, source.start, source.end)
            return
        outer, entries = prod(source.shape[: self.dim]), source.shape[self.dim]
        stride = source.num_bytes // (outer * entries)
        for row in range(outer):
            base = source.start + row * entries * stride
            for start, stop in self.runs[row % len(self.runs)]:
                yield ByteRange(source.file, base + start * stride, base + stop * stride)


def plan_outputs(
    tensors: Mapping[str, TensorInfo], *, roles: Mapping[str, Role], plan: Plan, mtp: Collection[str] = ()
) -> dict[Path, list[OutputTensor]]:
    """Every tensor of the pruned checkpoint, by source shard, in the order of the source's bytes.

    Args:
        tensors: The source's tensors.
        roles: Which of them depend on experts.
        plan: What is kept.
        mtp: Tensors of multi-token prediction layers, which the plan may leave out.

    Returns:
        Shards of which nothing is left are absent.
    """
    position = {layer: {expert: new for new, expert in enumerate(ids)} for layer, ids in plan.keep.items()}
    left_out = frozenset(mtp) if plan.mtp == "drop" else frozenset()
    outputs: dict[Path, list[OutputTensor]] = {}
    for key, info in tensors.items():
        if key in left_out:
            continue
        role = roles.get(key)
        if isinstance(role, OneExpert):
            name = _renumbered(key, role, position[role.layer], plan)
            output = None if name is None else OutputTensor(name, info, info.shape)
        elif isinstance(role, AllExperts):
            output = _sliced(info, role, plan)
        elif isinstance(role, Towers):
            runs = tuple(
                tuple(kept_runs(plan.keep[layer], num_experts=plan.model.num_experts)) for layer in role.layers
            )
            output = _cut(info, role.dim, runs)
        elif isinstance(role, ExpertIds):
            output = _remapped(info, role, plan)
        else:
            output = OutputTensor(key, info, info.shape)
        if output is not None:
            outputs.setdefault(info.file, []).append(output)
    return outputs


def _renumbered(key: str, role: OneExpert, position: Mapping[int, int], plan: Plan) -> str | None:
    """The key of one expert's tensor after pruning; None if the expert goes."""
    if role.expert >= plan.model.num_experts:  # no expert, so it stays behind those that do
        return role.renumbered(key, role.expert - plan.model.num_experts + plan.num_experts)
    new = position.get(role.expert)
    return None if new is None else role.renumbered(key, new + role.tower * plan.num_experts)


def _sliced(info: TensorInfo, role: AllExperts, plan: Plan) -> OutputTensor:
    keep = plan.keep[role.layer]
    if len(keep) == plan.model.num_experts:
        return OutputTensor(info.name, info, info.shape)
    runs = tuple(kept_runs(keep, num_experts=plan.model.num_experts, rows=role.rows, extra=role.extra))
    return _cut(info, role.dim, (runs,))


def _cut(info: TensorInfo, dim: int, runs: tuple[Runs, ...]) -> OutputTensor:
    if info.num_bytes % prod(info.shape[: dim + 1]):
        raise UnsupportedModelError(
            f"{info.file}: an expert of {info.name!r} ({info.dtype}) is not a whole number of bytes."
        )
    kept = sum(stop - start for start, stop in runs[0])
    return OutputTensor(info.name, info, (*info.shape[:dim], kept, *info.shape[dim + 1 :]), runs, dim)


def _remapped(info: TensorInfo, role: ExpertIds, plan: Plan) -> OutputTensor:
    shape = (info.shape[0], plan.top_k)
    if len(plan.keep[role.layer]) == plan.model.num_experts and shape == info.shape:
        return OutputTensor(info.name, info, info.shape)
    compute = partial(
        remap_stored_ids, info=info, keep=plan.keep[role.layer], num_experts=plan.model.num_experts, top_k=plan.top_k
    )
    return OutputTensor(info.name, info, shape, compute=compute)
