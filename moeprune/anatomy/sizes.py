"""Parameters and bytes of a model and of what a plan would leave of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.stored import model_names
from moeprune.checkpoint.header import TensorInfo

PARTS: tuple[str, ...] = (
    "routed experts",
    "router",
    "shared experts",
    "attention",
    "embeddings",
    "output head",
    "everything else",
)


@dataclass(frozen=True)
class ModelSizes:
    """Where a model's parameters are.

    Attributes:
        parameters: Number of parameters by part (:data:`PARTS`); tied ones are counted once.
        num_bytes: Stored bytes by part; computed from the config's dtype where no weights are at hand.
        num_experts: Routed experts a layer.
        top_k: Active experts a token.
        num_layers: Layers with experts.
    """

    parameters: dict[str, int]
    num_bytes: dict[str, int]
    num_experts: int
    top_k: int
    num_layers: int

    @property
    def bytes_per_expert(self) -> int:
        """Stored bytes of one routed expert of one layer."""
        return self.num_bytes["routed experts"] // (self.num_experts * self.num_layers)

    def total(self, *, num_experts: int | None = None) -> int:
        """All parameters, if every layer kept ``num_experts`` experts."""
        return _scaled(self.parameters, (num_experts or self.num_experts) / self.num_experts)

    def stored(self, *, num_experts: int | None = None) -> int:
        """All stored bytes, if every layer kept ``num_experts`` experts."""
        return _scaled(self.num_bytes, (num_experts or self.num_experts) / self.num_experts)

    def active(self, *, num_experts: int | None = None, top_k: int | None = None) -> int:
        """Parameters that take part in one token's forward pass, embeddings and output head included."""
        unused = self.parameters["routed experts"] * (1 - (top_k or self.top_k) / self.num_experts)
        dropped = self.parameters["router"] * (1 - (num_experts or self.num_experts) / self.num_experts)
        return round(sum(self.parameters.values()) - unused - dropped)


def measure_sizes(anatomy: Anatomy, tensors: Mapping[str, TensorInfo] | None = None) -> ModelSizes:
    """Count parameters and bytes by part. Reads no weight.

    Args:
        anatomy: The model.
        tensors: Its stored tensors, if there are any.
    """
    part_of = _parts(anatomy)
    parameters: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    seen: set[int] = set()
    for name, tensor in anatomy.skeleton.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            parameters[part_of[name]] += tensor.numel()
        seen.add(id(tensor))
    if tensors is None:
        num_bytes: dict[str, int] = {
            part: number * _bytes_per_parameter(anatomy.config) for part, number in parameters.items()
        }
    else:
        num_bytes = dict.fromkeys(PARTS, 0)
        for key, name in model_names(anatomy, tensors).items():
            num_bytes[part_of.get(name, "everything else")] += tensors[key].num_bytes
    return ModelSizes(
        parameters=dict(parameters),
        num_bytes=dict(num_bytes),
        num_experts=anatomy.num_experts.value,
        top_k=anatomy.top_k.value,
        num_layers=len(anatomy.layers),
    )


def _scaled(parts: Mapping[str, int], share: float) -> int:
    return round(sum(n * (share if part in ("routed experts", "router") else 1) for part, n in parts.items()))


def _bytes_per_parameter(config: Any) -> int:
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    return dtype.itemsize if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype)).itemsize


def _parts(anatomy: Anatomy) -> dict[str, str]:
    model = anatomy.skeleton
    experts = tuple(f"{layer.experts}." for layer in anatomy.layers)
    routers = tuple(f"{layer.router}." for layer in anatomy.layers)
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    modules: dict[str, nn.Module] = dict(model.named_modules())
    parts = {}
    for name in model.state_dict():
        module = modules[name.rpartition(".")[0]]
        if name.startswith(experts):
            parts[name] = "routed experts"
        elif name.startswith(routers) or name in anatomy.axes:
            parts[name] = "router"
        elif "shared" in name:
            parts[name] = "shared experts"
        elif module is inputs:
            parts[name] = "embeddings"
        elif module is head:
            parts[name] = "output head"
        elif "attn" in name or "attention" in name:
            parts[name] = "attention"
        else:
            parts[name] = "everything else"
    return parts


@dataclass(frozen=True)
class PrunedSizes:
    """Bytes and parameters before and after pruning.

    Attributes:
        bytes_before: Stored bytes of the source.
        bytes_after: Stored bytes of the pruned checkpoint.
        parameters_before: Parameters of the source.
        parameters_after: Parameters of the pruned checkpoint.
        active_before: Parameters that one token uses, before.
        active_after: Parameters that one token uses, after.
    """

    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int


def pruned_sizes(sizes: ModelSizes, *, num_experts: int, top_k: int) -> PrunedSizes:
    """What a plan with these counts leaves."""
    return PrunedSizes(
        bytes_before=sizes.stored(),
        bytes_after=sizes.stored(num_experts=num_experts),
        parameters_before=sizes.total(),
        parameters_after=sizes.total(num_experts=num_experts),
        active_before=sizes.active(),
        active_after=sizes.active(num_experts=num_experts, top_k=top_k),
    )
