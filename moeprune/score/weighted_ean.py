"""Weighted EAN: everything that the expert adds to the result."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score("weighted-ean", formula="sum over T of g |f|", source="arXiv 2510.13999 (baseline)", needs=("gated_norm_sum",))
def weighted_ean(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Sum of the norms of the expert's contributions (gate weight times output) over the tokens routed to it."""
    return sums["gated_norm_sum"].copy()
