"""Group tensors with an expert axis into layers: one router and its experts each."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from moeprune.anatomy.anatomy import ExpertAxis, MoeLayer, OwnTensor
from moeprune.anatomy.axes import FoundAxis, FoundOwn, decoder_layer_of, tied_names
from moeprune.errors import UnsupportedModelError


@dataclass
class _Parts:
    """The paths of modules in one decoder layer that hold experts, and of those that hold router matrices."""

    experts: set[str] = field(default_factory=set)
    routers: set[str] = field(default_factory=set)
    axes: list[FoundAxis] = field(default_factory=list)


def group_layers(
    model_type: str, skeleton: nn.Module, found: Sequence[FoundAxis], own: Sequence[FoundOwn]
) -> tuple[tuple[MoeLayer, ...], dict[str, ExpertAxis], dict[str, OwnTensor]]:
    """Say which router and which experts belong together.

    Args:
        model_type: For messages.
        skeleton: The model on the meta device.
        found: Its tensors with an expert axis.
        own: Its tensors of experts that are modules of their own.

    Returns:
        The layers, in the order of the model, and all tensors with the layer they belong to.

    Raises:
        UnsupportedModelError: If routers and experts do not come in pairs.
    """
    by_layer: dict[str, _Parts] = defaultdict(_Parts)
    for tensor in own:
        by_layer[decoder_layer_of(skeleton, tensor.name)].experts.add(tensor.name[: tensor.start].rpartition(".")[0])
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    # Two stacks of layers may share their weights; the second is then the first under other names.
    same = {other: names[0] for names in tied_names(skeleton) for other in names[1:]}
    own_axes = [axis for axis in found if axis.name not in same]
    for axis in own_axes:
        parts = by_layer[decoder_layer_of(skeleton, axis.name)]
        parts.axes.append(axis)
        if len(shapes[axis.name]) > 2 or axis.rows > 1:
            parts.experts.add(_parent(axis.name))
    for axis in own_axes:
        parts = by_layer[decoder_layer_of(skeleton, axis.name)]
        # A router's weight is a matrix with one row an expert, and so are the biases of fused experts.
        if len(shapes[axis.name]) == 2 and 1 not in shapes[axis.name] and _parent(axis.name) not in parts.experts:
            parts.routers.add(_parent(axis.name))
    layers: list[MoeLayer] = []
    axes: dict[str, ExpertAxis] = {}
    for name, parts in by_layer.items():
        made = _pair(model_type, name, parts)
        layers += made
        for axis in parts.axes:
            layer = _owner(axis.name, made)
            axes[axis.name] = ExpertAxis(axis.name, layer.name, axis.dim, axis.rows, axis.extra)
    axes |= {
        axis.name: dataclasses.replace(axes[same[axis.name]], name=axis.name) for axis in found if axis.name in same
    }
    own_tensors = {t.name: OwnTensor(t.name, _owner(t.name, layers).name, t.expert, t.start, t.stop) for t in own}
    return tuple(layers), axes, own_tensors


def _pair(model_type: str, decoder_layer: str, parts: _Parts) -> list[MoeLayer]:
    experts = sorted({_largest_without(path, parts.routers, decoder_layer) for path in parts.experts})
    experts = _joined(experts, decoder_layer)
    routers = sorted({_largest_without(path, {*parts.experts}, decoder_layer) for path in parts.routers})
    pairs = {path: max(routers, key=lambda router, path=path: _common(router, path), default="") for path in experts}
    if not decoder_layer or not experts or sorted(pairs.values()) != routers:
        raise UnsupportedModelError(
            f"{model_type}: expected one router for each set of experts in {decoder_layer or 'the model'!r}, found "
            f"routers {routers} and experts {experts}."
        )
    if len(experts) == 1:
        return [MoeLayer(name=decoder_layer, experts=experts[0], router=routers[0])]
    layers = []
    for path, router in pairs.items():
        shared = ".".join(path.split(".")[: _common(router, path)])
        layers.append(MoeLayer(name=shared, experts=path, router=router))
    return layers


def _largest_without(path: str, others: set[str], root: str) -> str:
    """The highest module above ``path`` and below ``root`` that holds none of ``others``."""
    while True:
        above = _parent(path)
        if above == root or not above.startswith(f"{root}.") or any(_within(other, above) for other in others):
            return path
        path = above


def _joined(experts: list[str], root: str) -> list[str]:
    """Modules that hold a part of the experts each (JetMoE's input and output projections) as the one above them."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for path in experts:
        by_parent[_parent(path)].append(path)
    return sorted(
        path
        for parent, paths in by_parent.items()
        for path in (paths if len(paths) == 1 or parent == root else [parent])
    )


def _owner(name: str, layers: Sequence[MoeLayer]) -> MoeLayer:
    """The layer that a tensor belongs to: the one with which it shares most of its path."""
    return max(layers, key=lambda layer: max(_common(name, layer.experts), _common(name, layer.router)))


def _common(a: str, b: str) -> int:
    """Number of leading path elements that two paths share."""
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


def _within(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
