"""Find out how a router works by asking it: run it once on random numbers and compare with the known formulas."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeprune.facts import Routing

if TYPE_CHECKING:
    from moeprune.anatomy.anatomy import ExpertAxis, MoeLayer

NUM_PROBES = 32
SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class Routed:
    """What a router answered to random hidden states.

    Attributes:
        logits: (tokens, experts), or what the router returns in their place.
        weights: (tokens, top-k).
        indices: Expert ids, (tokens, top-k).
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor


def probe_routing(
    skeleton: nn.Module, layers: Iterable[MoeLayer], axes: dict[str, ExpertAxis], *, hidden_size: int
) -> Routing:
    """Describe the routers of a model by the first one that can be run.

    Args:
        skeleton: The model on the meta device; only a router is given memory, as a copy.
        layers: Its layers.
        axes: The tensors with an expert axis, among them the router's biases.
        hidden_size: Size of the router's input.

    Returns:
        The routing without its groups; ``scoring="unknown"`` where no router returns selection and weights from hidden
        states alone, or where they follow no known formula.
    """
    seen = set()
    bias = "none"
    for layer in layers:
        kind = type(skeleton.get_submodule(layer.router))
        if kind in seen:
            continue
        seen.add(kind)
        bias = _bias_kind(layer, axes)
        routed = run_router(skeleton, layer, hidden_size=hidden_size)
        if routed is not None:
            return _match(routed, bias)
    return Routing(bias=bias)


def run_router(skeleton: nn.Module, layer: MoeLayer, *, hidden_size: int) -> Routed | None:
    """Run the router of one layer on random numbers; None if it needs more than hidden states or answers otherwise."""
    try:
        router = _materialise(skeleton.get_submodule(layer.router))
    except RuntimeError:  # larger than memory
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_PROBES, hidden_size, generator=generator) / hidden_size**0.5
    num_logits = next((p.shape[0] for p in router.parameters() if p.ndim == 2), 0)
    # Some blocks keep the correction bias themselves and hand it to the router.
    biases = [
        0.1 * torch.randn(num_logits, generator=generator)
        for name in inspect.signature(router.forward).parameters
        if "bias" in name
    ]
    for given in (hidden, hidden[None]):
        try:
            with torch.no_grad():
                outputs = router(given, *biases)
        except (TypeError, RuntimeError, AttributeError, ValueError, IndexError):
            continue
        if isinstance(outputs, tuple) and (routed := _sort_outputs(outputs)) is not None:
            return routed
    return None


def _sort_outputs(outputs: tuple) -> Routed | None:
    """Logits, weights and indices among the outputs of a router, which differ in their order."""
    tensors = [out.reshape(-1, out.shape[-1]) for out in outputs if isinstance(out, Tensor) and out.ndim >= 2]
    indices = [out for out in tensors if not out.is_floating_point() and out.shape[0] == NUM_PROBES]
    if len(indices) != 1:
        return None
    floats = [out.float() for out in tensors if out.is_floating_point()]
    weights = [out for out in floats if out.shape == indices[0].shape]
    logits = [out for out in floats if out.shape[0] == NUM_PROBES and out.shape[1] > int(indices[0].max())]
    if not weights or not logits:
        return None
    return Routed(logits=logits[0], weights=weights[0], indices=indices[0])


def _materialise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    real = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for tensor in [*real.parameters(), *real.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
    return real


def _bias_kind(layer: MoeLayer, axes: dict[str, ExpertAxis]) -> str:
    own = [axis.name for axis in axes.values() if axis.layer == layer.name]
    others = [name for name in own if not name.startswith(f"{layer.experts}.") and not name.endswith(".weight")]
    if any("correction" in name or "expert_bias" in name or "balancing" in name for name in others):
        return "correction"
    return "router" if any(name.endswith("bias") for name in others) else "none"


def _match(routed: Routed, bias: str) -> Routing:
    logits, weights, indices = routed.logits, routed.weights, routed.indices
    for name, score in SCORINGS.items():
        chosen = score(logits).gather(-1, indices)
        totals = weights.sum(-1)
        # With one active expert, weights that are divided by their sum are all 1.
        if indices.shape[-1] > 1 or float(weights.std()) > 1e-3:
            ratio = weights / chosen
            scale = ratio.median()
            if torch.allclose(ratio, scale, rtol=1e-3):
                return Routing(scoring=name, renormalised=False, scale=float(scale), bias=bias)
        if indices.shape[-1] > 1 and torch.allclose(
            weights, chosen / chosen.sum(-1, keepdim=True) * totals.median(), rtol=1e-3
        ):
            return Routing(scoring=name, renormalised=True, scale=float(totals.median()), bias=bias)
    return Routing(bias=bias)
