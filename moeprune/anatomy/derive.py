"""Derive where a model keeps its experts by building it twice and comparing shapes.

A tensor whose shape changes with the number of experts has an expert axis. No table of architectures is needed, so a
new transformers release is covered the day it appears.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from torch import nn

from moeprune.anatomy.anatomy import Anatomy, ExpertAxis, MoeLayer
from moeprune.anatomy.names import NUM_EXPERTS, TOP_K, ConfigField, find_field, groups_of
from moeprune.anatomy.routing import probe_routing
from moeprune.anatomy.skeleton import build_skeleton, with_value
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def derive_anatomy(config: PreTrainedConfig) -> Anatomy:
    """Derive the anatomy of the model that ``config`` describes. Reads no weight.

    Raises:
        UnsupportedModelError: If the model has no experts, or experts that cannot be indexed.
    """
    num_experts, top_k = _count_fields(config)
    skeleton = build_skeleton(config)
    # Doubling keeps every divisibility that the config may rely on (groups), and costs nothing on the meta device.
    doubled = build_skeleton(with_value(config, num_experts, 2 * num_experts.value))
    axes = _expert_axes(config.model_type, skeleton, doubled, num_experts)
    layers = _moe_layers(config.model_type, skeleton, axes, num_experts.value)
    n_group, topk_group = groups_of(config)
    routing = probe_routing(skeleton, layers[0], axes).model_copy(update={"n_group": n_group, "topk_group": topk_group})
    return Anatomy(config, skeleton, num_experts, top_k, layers, axes, routing)


def _count_fields(config: PreTrainedConfig) -> tuple[ConfigField, ConfigField]:
    num_experts, top_k = find_field(config, NUM_EXPERTS), find_field(config, TOP_K)
    if num_experts is None or num_experts.value < 2:
        raise UnsupportedModelError(
            f"{config.model_type}: not a Mixture-of-Experts model (its config has none of {', '.join(NUM_EXPERTS)})."
        )
    if top_k is None:
        raise UnsupportedModelError(
            f"{config.model_type}: the number of active experts is not in its config (looked for {', '.join(TOP_K)})."
        )
    return num_experts, top_k


def _expert_axes(
    model_type: str, skeleton: nn.Module, doubled: nn.Module, num_experts: ConfigField
) -> dict[str, ExpertAxis]:
    before = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    after = {name: tuple(tensor.shape) for name, tensor in doubled.state_dict().items()}
    if before.keys() != after.keys():
        raise UnsupportedModelError(f"{model_type}: its experts are separate modules, which is not supported yet.")
    axes = {}
    for name, shape in before.items():
        dims = [dim for dim, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
        if not dims:
            continue
        dim = dims[0]
        if len(dims) > 1 or (shape[dim], after[name][dim]) != (num_experts.value, 2 * num_experts.value):
            raise UnsupportedModelError(
                f"{model_type}: {name!r} changes from {list(shape)} to {list(after[name])} when the experts double; "
                "its expert axis has more than one row an expert, which is not supported yet."
            )
        axes[name] = ExpertAxis(name, decoder_layer_of(skeleton, name), dim)
    if not axes:
        raise UnsupportedModelError(
            f"{model_type}: no tensor depends on {num_experts.name} (= {num_experts.value}), so there are no experts."
        )
    return axes


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


def _moe_layers(
    model_type: str, skeleton: nn.Module, axes: dict[str, ExpertAxis], num_experts: int
) -> tuple[MoeLayer, ...]:
    by_layer: dict[str, list[ExpertAxis]] = defaultdict(list)
    for axis in axes.values():
        by_layer[axis.layer].append(axis)
    state = skeleton.state_dict()
    layers = []
    for layer, tensors in by_layer.items():
        experts = {a.name.rpartition(".")[0] for a in tensors if state[a.name].ndim == 3}
        # A router's weight is the one matrix of (experts, hidden); the fused experts' biases are matrices too.
        routers = {
            a.name.rpartition(".")[0] for a in tensors if state[a.name].ndim == 2 and 1 not in state[a.name].shape
        } - experts
        if not layer or len(experts) != 1 or len(routers) != 1:
            raise UnsupportedModelError(
                f"{model_type}: expected one router and one set of experts in {layer or 'the model'!r}, "
                f"found routers {sorted(routers)} and experts {sorted(experts)}."
            )
        layers.append(MoeLayer(name=layer, experts=experts.pop(), router=routers.pop()))
    return tuple(layers)
