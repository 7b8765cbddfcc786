"""Frequency ("hard" activation count)."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score("frequency", formula="|T|", source="arXiv 2505.03531 (activation count)")
def frequency(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """How many tokens were routed to the expert."""
    return sums["count"].copy()
