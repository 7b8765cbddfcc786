"""Following a module's own forward pass, in which it runs one expert after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeprune.calibrate.experts.seen import Seen
from moeprune.errors import UnsupportedModelError

TOLERANCE = 0.05
"""Share of the norm of a module's result that recorded contributions may miss: bfloat16 loses about a hundredth."""

Run = tuple[int, Float[Tensor, "_ hidden"]]
"""An expert that was run, and what it gave."""


@contextmanager
def wrapped_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace ``module.forward`` by ``wrap(forward)`` on this instance, and put back what was there."""
    own = module.__dict__.get("forward")  # accelerate hooks a module in the same way
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def joined(
    runs: list[Run], *, experts: Int[Tensor, " slots"], hidden: Float[Tensor, "tokens hidden"], module: nn.Module
) -> Float[Tensor, "slots hidden"]:
    """The outputs of all runs, one row a slot.

    Args:
        runs: What was recorded, in order.
        experts: Expert id of each slot that the router asked for, ascending.
        hidden: Input of the module.
        module: For messages.

    Raises:
        UnsupportedModelError: If other experts were run, or on other numbers of tokens, than the router asked for.
    """
    ids, counts = torch.unique_consecutive(experts, return_counts=True)
    asked = list(zip(ids.tolist(), counts.tolist(), strict=True))
    ran = [(expert, outputs.shape[0]) for expert, outputs in runs]
    if asked != ran:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be observed: its router asked for {_listed(asked)}, but seen was "
            f"{_listed(ran)}."
        )
    return torch.cat([outputs for _, outputs in runs]) if runs else hidden.new_empty(0, hidden.shape[-1])


def check_sum(
    seen: Seen,
    returned: Float[Tensor, "*batch hidden"],
    *,
    module: nn.Module,
    beside: Float[Tensor, "tokens hidden"] | None = None,
) -> None:
    """Check that what was recorded adds up to what the module returned.

    It does not where a class treats its experts' outputs in a way that the observer does not know: another order of
    tokens, a norm after the expert, a factor. Statistics of such a class would be wrong without any other sign.

    Args:
        seen: The recorded call.
        returned: The module's result.
        module: For the message.
        beside: What the module adds besides the recorded contributions.

    Raises:
        UnsupportedModelError: If it does not add up.
    """
    outputs = seen.outputs.float()
    total = torch.zeros_like(returned.reshape(-1, returned.shape[-1]), dtype=torch.float32)
    total.index_add_(0, seen.tokens, outputs * seen.gates.float().unsqueeze(-1))
    if beside is not None:
        total += beside.float()
    expected = returned.float().reshape(total.shape)
    missed, norm = torch.linalg.vector_norm(total - expected), torch.linalg.vector_norm(expected)
    # Where the model overflows there is nothing to compare; the statistics are refused for it, naming layer and expert.
    if bool(torch.isfinite(missed)) and missed > TOLERANCE * norm:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be observed: gate weights times expert outputs miss its result by "
            f"{float(missed / norm):.0%}. The class combines its experts in a way of its own."
        )


def _listed(runs: list[tuple[int, int]]) -> str:
    named = ", ".join(f"expert {expert} on {tokens} tokens" for expert, tokens in runs[:3])
    return (named + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")) or "none"
