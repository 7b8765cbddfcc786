"""MSAN: mean squared activation norm."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, mean_over_routed, score


@score("msan", formula="mean over T of |f|^2", source="arXiv 2606.15716", needs=("count", "norm_sq_sum"))
def msan(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Mean squared L2 norm of the expert's unweighted outputs where it is chosen."""
    return mean_over_routed(sums["norm_sq_sum"], sums)
