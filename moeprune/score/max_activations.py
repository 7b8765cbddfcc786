"""Largest activation: how far any element of an expert's output ever was from zero."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score(
    "max-activations",
    formula="max over T of the largest |element| of f",
    source="arXiv 2507.23279 (super experts); code of arXiv 2510.13999 (there the largest element, with its sign)",
    needs=("max_abs",),
)
def max_activations(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """The largest element of the expert's unweighted outputs; keeps super experts, and says little of the others."""
    return sums["max_abs"].copy()
