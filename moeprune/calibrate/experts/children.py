"""Experts as child modules, one each: switch_transformers, nllb_moe.

A hook on every child sees its output. Which tokens it was given, and with what weight, is in the arguments of the
container: a mask of the chosen experts, from which tokens beyond an expert's capacity are already missing. Whether the
container sends a token to the expert that is asked for is tried on a toy of the same class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.calibrate.experts.recorded import Run, check_sum, joined, wrapped_forward
from moeprune.calibrate.experts.seen import EVERYTHING, Kind, Report, Seen, arguments

EXPERT = re.compile(r"expert_(\d+)")


def _matches(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) and bool(_experts(module))


def _experts(module: nn.Module) -> dict[int, nn.Module]:
    matches = {EXPERT.fullmatch(name): child for name, child in module.named_children()}
    return {int(match[1]): child for match, child in matches.items() if match}


def _refusal(module: nn.Module) -> str | None:
    asked, ran, _ = _try(module)
    if ran == {asked: 1}:
        return None
    listed = ", ".join(f"expert {expert} on {tokens}" for expert, tokens in ran.items())
    return (
        f"asked to run expert {asked} on 1 token, its forward pass in this version of transformers runs {listed}, so "
        "that its statistics would not be those of the trained model"
    )


class _PassOn(nn.Module):
    """An expert that counts its tokens and returns them."""

    tokens = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the input."""
        self.tokens += hidden_states.shape[0]
        return hidden_states


def _try(module: nn.Module) -> tuple[int, dict[int, int], float]:
    """Ask a toy of the class to run its last expert on one token of one element, 1, with weight 1.

    Returns:
        The expert asked for, how many tokens each expert was given, and the result: the factor that the class applies
        to the weight.
    """
    toys = {expert: _PassOn() for expert in _experts(module)}
    rest = {name: child for name, child in module.named_children() if not EXPERT.fullmatch(name)}
    toy: Any = copy.copy(module)
    toy.__dict__["_modules"] = {f"expert_{expert}": child for expert, child in toys.items()} | rest
    toy.__dict__["training"] = False
    asked = max(toys)
    mask = torch.zeros(1, 1, len(toys), dtype=torch.long)
    mask[..., asked] = 1
    weights = torch.ones(1, 1)
    if "router_mask" in arguments(module):  # nllb_moe: (tokens, experts) for both
        mask, weights = mask[:, 0], mask[:, 0].float()
    result = toy.forward(torch.ones(1, 1), mask, weights)
    return asked, {expert: child.tokens for expert, child in toys.items() if child.tokens}, float(result)


@contextmanager
def _watch(module: nn.Module, parent: nn.Module, report: Report) -> Iterator[None]:
    factor = _try(module)[-1]
    runs: list[Run] = []
    first = True

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            nonlocal first
            runs.clear()
            returned = original(hidden_states, chosen, weights)
            with torch.no_grad():
                mask = chosen.reshape(hidden_states.shape[0], -1) > 0
                gates = torch.where(mask, weights.expand(mask.shape) * factor, 0.0)
                experts, tokens = torch.nonzero(mask.t(), as_tuple=True)
                outputs = joined(runs, experts=experts, hidden=hidden_states, module=module)
                seen = Seen(outputs, gates[tokens, experts], experts, tokens, gates, inputs=hidden_states)
                if first:
                    check_sum(seen, returned, module=module)
                    first = False
                report(seen)
            runs.clear()
            return returned

        return forward

    with ExitStack() as stack:
        for expert, child in _experts(module).items():
            stack.callback(child.register_forward_hook(_recording(runs, expert)).remove)
        stack.enter_context(wrapped_forward(module, wrap))
        yield


def _recording(runs: list[Run], expert: int) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _inputs, output: runs.append((expert, output))


CHILDREN = Kind("a ModuleDict of experts", EVERYTHING, _matches, _refusal, _watch)
