"""See what every routed expert does, in the forward pass that the model does anyway.

The observer is an experts implementation for transformers: it computes what ``grouped_mm`` computes, in the same order
and with the same results bit for bit, and on the way reads the unweighted expert outputs. It therefore sees the model's
real selection and weights, whatever its router does, and no expert runs on a token that was not routed to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, _grouped_linear

from moeprune.calibrate.stats import EXPERT_SUMS, LAYER_SUMS, Stats
from moeprune.errors import UnsupportedModelError

IMPLEMENTATION = "moeprune_observe"
CACHE_ELEMENTS = 131_072
SUM_COLUMNS = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum")
assert {*SUM_COLUMNS, "max_abs"} == EXPERT_SUMS.keys() and LAYER_SUMS.keys() == {"gate_entropy_sum"}


class LayerAccumulator:
    """Running sums of one layer over the tokens of one domain, in float64 on the layer's device."""

    def __init__(self, num_experts: int, device: torch.device):
        self.sums = torch.zeros(num_experts, len(SUM_COLUMNS), dtype=torch.float64, device=device)
        self.max_abs = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.gate_entropy = torch.zeros((), dtype=torch.float64, device=device)

    def add(
        self,
        outputs: Float[Tensor, "slots hidden"],
        gates: Float[Tensor, " slots"],
        experts: Int[Tensor, " slots"],
        keep: Bool[Tensor, " slots"] | None,
    ) -> None:
        """Add routed slots (a slot is one token at one of its experts).

        Args:
            outputs: Unweighted output f of the slot's expert, any float dtype; norms are taken in float32.
            gates: Weight g with which the model combines it.
            experts: Expert id of the slot.
            keep: False for slots of padding tokens, which are not counted; None where there is no padding.
        """
        norms, peaks = norms_and_peaks(outputs)
        gates = gates.float()
        columns = torch.stack([torch.ones_like(gates), gates, norms, norms.square(), gates * norms], dim=-1)
        if keep is not None:
            columns = torch.where(keep.unsqueeze(-1), columns, 0.0)
            peaks = torch.where(keep, peaks, 0.0)
        self.sums.index_add_(0, experts, columns.double())
        self.max_abs.scatter_reduce_(0, experts, peaks, reduce="amax")

    def add_entropy(self, gates: Float[Tensor, "tokens top_k"], keep: Bool[Tensor, " tokens"] | None) -> None:
        """Add the entropy of each token's top-k weights, normalised to sum to 1."""
        share = gates.float() / gates.float().sum(-1, keepdim=True)
        entropy = torch.special.entr(share).sum(-1)
        if keep is not None:
            entropy = torch.where(keep, entropy, 0.0)
        self.gate_entropy += entropy.double().sum()


class Observer:
    """Collects statistics while a model runs.

    Args:
        model: The model, in memory.
        experts: Path of each MoE layer's experts module, in the order of the statistics' layers.
        num_experts: Routed experts a layer.

    Raises:
        UnsupportedModelError: If the model's experts do not take part in transformers' experts interface.
    """

    def __init__(self, model: PreTrainedModel, *, experts: tuple[str, ...], num_experts: int):
        self.model = model
        self._modules = [model.get_submodule(path) for path in experts]
        self._num_experts = num_experts
        self._mask: Bool[Tensor, " tokens"] | None = None
        self._current: list[LayerAccumulator] = []
        self._calls = [0] * len(experts)
        for path, module in zip(experts, self._modules, strict=True):
            if not hasattr(module, "_apply_gate"):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {path} ({type(module).__name__}) is not part of transformers' experts "
                    "interface, so its experts cannot be observed yet."
                )

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """Route the model's experts through the observer inside the block, and back afterwards."""
        before = self.model.get_experts_implementation()
        by_id = {id(module): index for index, module in enumerate(self._modules)}

        def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return self._forward(by_id[id(module)], module, hidden_states, top_k_index, top_k_weights)

        ExpertsInterface.register(IMPLEMENTATION, forward)
        self.model.set_experts_implementation(IMPLEMENTATION)
        try:
            yield self
        finally:
            self.model.set_experts_implementation(before)
            ExpertsInterface._global_mapping.pop(IMPLEMENTATION, None)

    def start(self) -> None:
        """Begin a domain with sums of zero."""
        self._current = [
            LayerAccumulator(self._num_experts, next(module.parameters()).device) for module in self._modules
        ]
        self._calls = [0] * len(self._modules)

    def set_mask(self, mask: Bool[Tensor, "batch length"] | None) -> None:
        """Say which tokens of the next forward pass are text (True) and which are padding; None means all are text."""
        self._mask = None if mask is None or bool(mask.all()) else mask.reshape(-1)

    def finish(self, stats: Stats, *, domain: str, tokens: int) -> None:
        """Add the sums since :meth:`start` to ``stats`` under ``domain``; ``tokens`` of text were run."""
        at = stats.domains.index(domain)
        for layer, accumulator in enumerate(self._current):
            assert self._calls[layer] > 0, f"{stats.model.layers[layer]} was never called"
            columns = accumulator.sums.cpu().numpy()
            for column, name in enumerate(SUM_COLUMNS):
                stats.experts[name][at, layer] += columns[:, column]
            peak = stats.experts["max_abs"][at, layer]
            peak[:] = accumulator.max_abs.double().cpu().numpy().clip(min=peak)
            stats.layers["gate_entropy_sum"][at, layer] += float(accumulator.gate_entropy)
        stats.tokens[at] += tokens

    def _forward(
        self, layer: int, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        top_k = top_k_index.shape[-1]
        experts, order = torch.sort(top_k_index.reshape(-1))
        gates = top_k_weights.reshape(-1)[order]
        outputs = run_experts(module, hidden_states[order // top_k], experts)
        mask = self._mask
        self._calls[layer] += 1
        with torch.no_grad():
            if mask is not None:
                mask = mask.to(gates.device)
            keep = None if mask is None else mask[order // top_k]
            self._current[layer].add(outputs, gates, experts, keep)
            self._current[layer].add_entropy(top_k_weights, mask)
        # The product of the plain pass, made in place where that is the same arithmetic: outputs are not needed any
        # more.
        in_place = not torch.is_grad_enabled() and torch.result_type(outputs, gates) == outputs.dtype
        weighted = outputs.mul_(gates.unsqueeze(-1)) if in_place else outputs * gates.unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        combined = weighted[back].view(-1, top_k, weighted.shape[-1]).sum(dim=1)
        return combined.to(hidden_states.dtype)


def norms_and_peaks(
    outputs: Float[Tensor, "slots hidden"],
) -> tuple[Float[Tensor, " slots"], Float[Tensor, " slots"]]:
    """L2 norm and largest absolute element of every row, in float32.

    On a CPU the rows are taken in pieces that stay in its cache: memory that is written once and read once, such as a
    float32 copy of everything, would cost more than all the arithmetic here.
    """
    rows = max(1, CACHE_ELEMENTS // outputs.shape[-1]) if outputs.device.type == "cpu" else outputs.shape[0]
    norms, peaks = [], []
    for piece in outputs.split(rows):
        values = piece.float()
        norms.append(torch.linalg.vector_norm(values, dim=-1))
        peaks.append(torch.maximum(values.amax(-1), -values.amin(-1)))
    return torch.cat(norms), torch.cat(peaks)


def run_experts(
    module: Any, hidden: Float[Tensor, "slots hidden"], experts: Int[Tensor, " slots"]
) -> Float[Tensor, "slots hidden"]:
    """Run each slot through its expert.

    Args:
        module: A transformers experts module (see ``use_experts_implementation`` for its attributes).
        hidden: Input of each slot, sorted by expert.
        experts: Expert id of each slot, ascending.

    Returns:
        The unweighted outputs in the same order; the arithmetic is that of transformers' ``grouped_mm``.
    """
    counts = torch.bincount(experts, minlength=module.num_experts)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

    def project(inputs: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        bias = getattr(module, f"{name}_bias")[experts] if module.has_bias else None
        if _aligned(inputs, weight):
            return _grouped_linear(inputs, weight, ends, bias=bias, is_transposed=module.is_transposed)
        matrix = weight if module.is_transposed else weight.transpose(-2, -1)
        outputs = torch.ops.transformers.grouped_mm_fallback(inputs.to(weight.dtype), matrix, offs=ends)
        return outputs if bias is None else outputs.add_(bias)

    inner = project(hidden, "gate_up_proj" if module.has_gate else "up_proj")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = project(inner, "down_proj")
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


def _aligned(inputs: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these operands: rows of both must be multiples of 16 bytes."""
    return all(size * weight.element_size() % 16 == 0 for size in (inputs.shape[-1], weight.shape[-1]))
