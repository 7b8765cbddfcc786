"""What an observed call of an experts module tells, and what a way of observing is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn

from moeprune.calibrate.quantities import QUANTITIES

EVERYTHING = frozenset(name for name, quantity in QUANTITIES.items() if quantity.level != "full")


@dataclass(frozen=True)
class Seen:
    """One call, slot by slot; a slot is one token at one of its experts.

    Attributes:
        outputs: The expert's unweighted output f, or g f where ``weighted``.
        gates: Weight g with which the model combines it.
        experts: Expert id.
        tokens: Row of the token in the call.
        weights: All weights of each token, those of experts that compute nothing included; 0 where there is none.
        weighted: Whether the model multiplies an expert's input by g, so that only its contribution can be seen.
        inputs: What the experts are given, where it is the same for all experts of a token.
    """

    outputs: Float[Tensor, "slots hidden"]
    gates: Float[Tensor, " slots"]
    experts: Int[Tensor, " slots"]
    tokens: Int[Tensor, " slots"]
    weights: Float[Tensor, "tokens choices"]
    weighted: bool = False
    inputs: Float[Tensor, "tokens hidden"] | None = None


Report: TypeAlias = Callable[[Seen], None]


@dataclass(frozen=True)
class Kind:
    """A way in which a module can hold experts, and how they are seen.

    Attributes:
        name: What such a module is, for people.
        quantities: The names of :data:`moeprune.calibrate.quantities.QUANTITIES` that it gives, if the router and the
            layer give what they need.
        matches: Whether a module is of this kind; looks at its interface, never at weights.
        refusal: Why this module cannot be observed although it is of this kind, or None.
        watch: ``watch(module, parent, report)`` reports every call inside the block; results do not change.
        run_all: ``run_all(module, hidden)`` runs every expert on every token, with weights of 1; None if it cannot.
    """

    name: str
    quantities: frozenset[str]
    matches: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    watch: Callable[[nn.Module, nn.Module, Report], AbstractContextManager[None]]
    run_all: Callable[[nn.Module, Tensor], Tensor] | None = None


def arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of the class's ``forward``; that of the instance may be wrapped."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def packed(module: nn.Module, name: str) -> str | None:
    """Why the products with the weight ``name`` cannot be followed: it is missing or packed; None if they can."""
    try:
        dtype = module.get_parameter(name).dtype
    except AttributeError:
        return f"it has no weight {name!r}"
    if dtype.is_floating_point and dtype.itemsize > 1:
        return None
    return f"its weights are stored as {str(dtype).removeprefix('torch.')}; load the model dequantised"
