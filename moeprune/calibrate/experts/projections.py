"""Experts as pairs of grouped projections around a router: both mixtures of jetmoe.

Hooks on the router and on the last projection see everything. In the mixture of attention heads an expert is a query
and an output projection, with attention between them; its f is what its output projection gives, which the model
multiplies with g and adds up just as in the mixture of feed-forward experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.calibrate.experts.seen import EVERYTHING, Kind, Report, Seen


def _matches(module: nn.Module) -> bool:
    children = dict(module.named_children())
    names = {"router", "input_linear", "output_linear"}
    return names <= children.keys() and hasattr(children["output_linear"], "num_experts")


@contextmanager
def _watch(module: nn.Module, parent: nn.Module, report: Report) -> Iterator[None]:
    last: Any = module.get_submodule("output_linear")
    latest: list[tuple[Tensor, Tensor, Tensor, list[int], Tensor]] = []

    def routed(_: nn.Module, __: Any, result: tuple[Tensor, Tensor, Tensor, list[int], Tensor]) -> None:
        latest[:] = [result]

    def projected(_: nn.Module, __: Any, outputs: Tensor) -> None:
        ((order, tokens, gates, sizes, logits),) = latest
        with torch.no_grad():
            experts = torch.arange(len(sizes), device=gates.device).repeat_interleave(order.new_tensor(sizes))
            # ``order`` is the slot, token by token, that each row was sorted from.
            weights = torch.empty_like(gates)
            weights[order] = gates
            report(Seen(outputs, gates, experts, tokens, weights.view(logits.shape[0], -1)))

    hooks = [module.get_submodule("router").register_forward_hook(routed), last.register_forward_hook(projected)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


PROJECTIONS = Kind("a router between grouped projections", EVERYTHING, _matches, lambda module: None, _watch)
