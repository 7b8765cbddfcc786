"""Mean activation norm: EAN, whatever the expert's share of the tokens."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, mean_over_routed, score


@score(
    "ean-mean", formula="mean over T of |f|", source="arXiv 2606.15716 (MAN; 2504.05586)", needs=("count", "norm_sum")
)
def ean_mean(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Mean L2 norm of the expert's unweighted outputs where it is chosen."""
    return mean_over_routed(sums["norm_sum"], sums)
