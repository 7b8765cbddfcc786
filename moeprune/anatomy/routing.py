"""Find out how a router works by asking it: run it once on random numbers and compare with the known formulas."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeprune.facts import Routing

if TYPE_CHECKING:
    from moeprune.anatomy.anatomy import ExpertAxis, MoeLayer

NUM_PROBES = 32
SCORINGS = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": lambda logits: logits.sigmoid()}


def probe_routing(skeleton: nn.Module, layer: MoeLayer, axes: dict[str, ExpertAxis]) -> Routing:
    """Describe the router of one layer.

    Args:
        skeleton: The model on the meta device; only the router is given memory, as a copy.
        layer: The layer whose router is run.
        axes: The tensors with an expert axis, among them the router's biases.

    Returns:
        The routing without its groups; ``scoring="unknown"`` where the router does not return (logits, weights,
        indices) from hidden states alone or follows no known formula.
    """
    router = _materialise(skeleton.get_submodule(layer.router))
    hidden_size = skeleton.get_parameter(f"{layer.router}.weight").shape[-1]
    hidden = torch.randn(NUM_PROBES, hidden_size, generator=torch.Generator().manual_seed(0)) / hidden_size**0.5
    bias = _bias_kind(layer, axes)
    try:
        with torch.no_grad():
            outputs = router(hidden)
    except (TypeError, RuntimeError, AttributeError):  # it needs more than hidden states
        return Routing(bias=bias)
    if not (isinstance(outputs, tuple) and len(outputs) == 3):
        return Routing(bias=bias)
    logits, weights, indices = (output.float() if output.is_floating_point() else output for output in outputs)
    if logits.shape[0] != NUM_PROBES or weights.shape != indices.shape:
        return Routing(bias=bias)
    return _match(logits, weights, indices, bias)


def _materialise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    real = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for tensor in [*real.parameters(), *real.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
    return real


def _bias_kind(layer: MoeLayer, axes: dict[str, ExpertAxis]) -> str:
    own = {axis.name for axis in axes.values() if axis.layer == layer.name}
    if f"{layer.router}.bias" in own:
        return "router"
    known = {f"{layer.router}.weight"}
    others = {name for name in own - known if not name.startswith(f"{layer.experts}.")}
    return "correction" if others else "none"


def _match(logits: Tensor, weights: Tensor, indices: Tensor, bias: str) -> Routing:
    for name, score in SCORINGS.items():
        chosen = score(logits).gather(-1, indices)
        ratio = weights / chosen
        scale = ratio.median()
        if torch.allclose(ratio, scale, rtol=1e-3):
            return Routing(scoring=name, renormalised=False, scale=float(scale), bias=bias)
        totals = weights.sum(-1)
        if torch.allclose(weights, chosen / chosen.sum(-1, keepdim=True) * totals.median(), rtol=1e-3):
            return Routing(scoring=name, renormalised=True, scale=float(totals.median()), bias=bias)
    return Routing(bias=bias)
