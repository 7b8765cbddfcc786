"""Experts that all compute every token: llama4.

The gate multiplies the input of an expert, with 0 where it was not chosen, so that what an expert adds to the result is
f(g x) and not g f(x). The contribution is seen; the unweighted output would have to be computed a second time, and its
norms are not part of the statistics of such models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.calibrate.experts.seen import EVERYTHING, Kind, Report, Seen, arguments
from moeprune.errors import UnsupportedModelError


def _matches(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    stacked = {"gate_up_proj", "down_proj"} <= parameters.keys() and parameters["down_proj"].ndim == 3
    return stacked and arguments(module) == ["hidden_states"]


@contextmanager
def _watch(module: nn.Module, parent: nn.Module, report: Report) -> Iterator[None]:
    router = getattr(parent, "router", None)
    if not isinstance(router, nn.Module):
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be observed: {type(parent).__name__}, which calls it, has no router "
            "beside it that tells the scores."
        )
    latest: list[Tensor] = []

    def routed(_: nn.Module, __: Any, result: tuple[Tensor, Tensor]) -> None:
        latest[:] = [result[0]]

    def computed(_: nn.Module, __: Any, outputs: Tensor) -> None:
        (scores,) = latest  # (tokens, experts), 0 where an expert was not chosen
        with torch.no_grad():
            experts, tokens = torch.nonzero(scores.t(), as_tuple=True)
            rows = experts * scores.shape[0] + tokens
            report(Seen(outputs[rows], scores[tokens, experts], experts, tokens, scores, weighted=True))

    hooks = [router.register_forward_hook(routed), module.register_forward_hook(computed)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


DENSE = Kind(
    "stacked weights that compute every token",
    EVERYTHING - {"norm_sum", "norm_sq_sum", "max_abs", "output_sum"},
    _matches,
    lambda module: None,
    _watch,
)
