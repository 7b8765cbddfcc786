"""Experts that take part in transformers' experts interface, which is most of them.

The observer is an experts implementation: it computes what ``grouped_mm`` computes, in the same order and with the same
results bit for bit, and on the way reads the unweighted expert outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _grouped_linear

from moeprune.calibrate.experts.seen import Kind, Report, Seen, packed
from moeprune.calibrate.quantities import QUANTITIES

IMPLEMENTATION = "moeprune_observe"
REPORT = "_moeprune_report"


def _matches(module: nn.Module) -> bool:
    return _dispatcher(module) is not None


def _refusal(module: nn.Module) -> str | None:
    if _dispatcher(module) is not ALL_EXPERTS_FUNCTIONS:
        return "it dispatches to kernels of its own for quantised weights; load the model dequantised"
    return packed(module, "down_proj")


def _dispatcher(module: nn.Module) -> Any:
    """The table of implementations that the decorated ``forward`` chooses from; None if it is not decorated.

    The decorator leaves no other mark that is its own: the attributes it sets are found on undecorated classes, too.
    """
    forward = type(module).forward
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") if inspect.isfunction(forward) else None


@contextmanager
def _watch(module: nn.Module, parent: nn.Module, report: Report) -> Iterator[None]:
    """Let the module choose the observing implementation, and its own again afterwards.

    It is the config that the module itself reads that is changed: in models with several towers it need not be the
    model's. Other modules that share it run the same implementation and report nothing.
    """
    config: Any = module.config
    before = config._experts_implementation_internal
    outermost = IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS
    if outermost:
        ExpertsInterface.register(IMPLEMENTATION, _forward)
    config._experts_implementation_internal = IMPLEMENTATION
    setattr(module, REPORT, report)
    try:
        yield
    finally:
        delattr(module, REPORT)
        config._experts_implementation_internal = before
        if outermost:
            ExpertsInterface._global_mapping.pop(IMPLEMENTATION, None)


def _forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    top_k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1))
    tokens = order // top_k
    gates = top_k_weights.reshape(-1)[order]
    outputs = run_experts(module, hidden_states[tokens], experts)
    report: Report | None = getattr(module, REPORT, None)
    if report is not None:
        with torch.no_grad():
            report(Seen(outputs, gates, experts, tokens, top_k_weights, inputs=hidden_states))
    # The product of the plain pass, made in place where that is the same arithmetic: outputs are not needed any
    # more.
    in_place = not torch.is_grad_enabled() and torch.result_type(outputs, gates) == outputs.dtype
    weighted = outputs.mul_(gates.unsqueeze(-1)) if in_place else outputs * gates.unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    combined = weighted[back].view(-1, top_k, weighted.shape[-1]).sum(dim=1)
    return combined.to(hidden_states.dtype)


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
    # Found by search, because a GPU would have to be waited for to count the slots of each expert.
    ids = torch.arange(module.num_experts, device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, ids, right=True, out_int32=True)

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


def _run_all(module: Any, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "experts tokens hidden"]:
    tokens, experts = hidden.shape[0], module.num_experts
    ids = torch.arange(experts, device=hidden.device).repeat_interleave(tokens)
    return run_experts(module, hidden.repeat(experts, 1), ids).view(experts, tokens, -1)


INTERFACE = Kind("transformers' experts interface", frozenset(QUANTITIES), _matches, _refusal, _watch, run_all=_run_all)
