"""What a criterion is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from moeprune.errors import PlanError
from moeprune.registry import Registry

Sums = Mapping[str, Float64[ndarray, "layers experts"]]


@runtime_checkable
class ScoreFunction(Protocol):
    """Statistics to saliency, (layers, experts), float64; larger means: keep."""

    def __call__(self, sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
        """Score the experts.

        Args:
            sums: The arrays of :data:`moeprune.calibrate.stats.EXPERT_SUMS`, domains already mixed.
            seed: For criteria that draw random numbers.
        """
        ...


@dataclass(frozen=True)
class Score:
    """A criterion.

    Attributes:
        name: As written in recipes.
        function: Computes it.
        formula: What it computes, with g the gate weight, f the expert's unweighted output, T the tokens routed to it.
        source: Paper that proposed or measured it.
    """

    name: str
    function: ScoreFunction
    formula: str
    source: str


SCORES: Registry[Score] = Registry("score", PlanError)


def score(name: str, *, formula: str, source: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register the decorated function as a criterion."""

    def add(function: ScoreFunction) -> ScoreFunction:
        SCORES.register(name, Score(name, function, formula, source))
        return function

    return add


def mean_over_routed(total: Float64[ndarray, "layers experts"], sums: Sums) -> Float64[ndarray, "layers experts"]:
    """``total`` divided by the tokens routed to each expert; 0 for experts that were never chosen."""
    count = sums["count"]
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
