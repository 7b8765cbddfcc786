"""EAN: expert activation norm."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score("ean", formula="sum over T of |f|", source="arXiv 2504.05586", needs=("norm_sum",))
def ean(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Sum of the L2 norms of the expert's unweighted outputs over the tokens routed to it."""
    return sums["norm_sum"].copy()
