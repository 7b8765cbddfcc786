"""REAP: router-weighted expert activation pruning."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, mean_over_routed, score


@score("reap", formula="mean over T of g |f|", source="arXiv 2510.13999", needs=("count", "gated_norm_sum"))
def reap(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Mean contribution (gate weight times output norm) of the expert where it is chosen."""
    return mean_over_routed(sums["gated_norm_sum"], sums)
