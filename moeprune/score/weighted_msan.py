"""Mean squared contribution: MSAN of what the expert adds, gate weight included."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, mean_over_routed, score


@score(
    "weighted-msan",
    formula="mean over T of |g f|^2",
    source="arXiv 2606.15716 (its family of scores, at alpha = beta = 2)",
    needs=("count", "gated_norm_sq_sum"),
)
def weighted_msan(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Mean squared L2 norm of the expert's contributions (gate weight times output) where it is chosen."""
    return mean_over_routed(sums["gated_norm_sq_sum"], sums)
