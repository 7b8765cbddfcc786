"""Find every tensor that depends on the number of experts, by building the model twice and comparing shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moeprune.anatomy.quirks.extra_rows import check_extra_rows
from moeprune.errors import UnsupportedModelError

# The number of an expert that is a module or a stored tensor of its own. Some types say `experts.expert_7`.
EXPERT_NUMBER = re.compile(r"(?<=experts\.)(?:expert_)?(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class FoundAxis:
    """An expert axis before it is known to which set of experts it belongs."""

    name: str
    dim: int
    rows: int
    extra: int


@dataclass(frozen=True, slots=True)
class FoundOwn:
    """A tensor of one expert; ``name[start:stop]`` is its number."""

    name: str
    expert: int
    start: int
    stop: int


def find_axes(
    model_type: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, num_experts: int
) -> tuple[list[FoundAxis], list[FoundOwn]]:
    """Compare a model with the same model with twice the experts.

    Args:
        model_type: For messages and to look up quirks.
        before: State dict of the model, on the meta device.
        after: State dict with ``2 * num_experts`` experts.
        num_experts: Experts a layer in ``before``.

    Raises:
        UnsupportedModelError: If a tensor depends on the experts in a way that cannot be indexed.
    """
    own = _own_tensors(model_type, before, after, num_experts)
    names = {tensor.name for tensor in own}
    axes = []
    for name, tensor in before.items():
        if name in names:
            continue
        shape, grown = tuple(tensor.shape), tuple(after[name].shape)
        dims = [dim for dim, (a, b) in enumerate(zip(shape, grown, strict=True)) if a != b]
        if not dims:
            continue
        dim = dims[0]
        rows, rest = divmod(grown[dim] - shape[dim], num_experts)
        extra = shape[dim] - rows * num_experts
        if len(dims) > 1 or rest or rows < 1 or extra < 0:
            raise UnsupportedModelError(
                f"{model_type}: {name!r} changes from {list(shape)} to {list(grown)} when the experts double from "
                f"{num_experts}; experts that are stored in this way cannot be indexed."
            )
        if extra:
            check_extra_rows(model_type, name, extra)
        axes.append(FoundAxis(name, dim, rows, extra))
    return axes, own


def _own_tensors(
    model_type: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], num_experts: int
) -> list[FoundOwn]:
    """Tensors of experts that are modules of their own: some of them are in ``after`` only."""
    added = after.keys() - before.keys()
    if not added and before.keys() <= after.keys():
        return []
    patterns = set()
    for name in added:
        number = EXPERT_NUMBER.search(name)
        if number is None or not num_experts <= int(number.group(1)) < 2 * num_experts:
            raise UnsupportedModelError(
                f"{model_type}: {name!r} appears when the experts double; it cannot be said which expert it belongs to."
            )
        patterns.add(_pattern(name, number))
    own = []
    for name in before:
        number = EXPERT_NUMBER.search(name)
        if number is not None and _pattern(name, number) in patterns:
            own.append(FoundOwn(name, int(number.group(1)), *number.span(1)))
    return own


def _pattern(name: str, number: re.Match[str]) -> str:
    return f"{name[: number.start(1)]}*{name[number.end(1) :]}"


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of a state dict, those of one tensor together: tied tensors have several."""
    by_identity: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity[id(tensor)].append(name)
    return list(by_identity.values())


def decoder_layer_of(model: nn.Module, name: str) -> str:
    """The path of the element of the outermost module list that ``name`` lies in (``model.layers.3``), or ``""``."""
    module: nn.Module = model
    parts = name.split(".")
    for depth, part in enumerate(parts[:-1]):
        is_list = isinstance(module, nn.ModuleList)
        module = getattr(module, part)
        if is_list:
            return ".".join(parts[: depth + 1])
    return ""
