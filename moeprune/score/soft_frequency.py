"""Soft frequency ("soft" activation count, gate sum)."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score(
    "soft-frequency",
    formula="sum over T of g",
    source="arXiv 2505.03531 (soft count; SEER-MoE, arXiv 2404.05089)",
    needs=("gate_sum",),
)
def soft_frequency(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """How much weight the router gave the expert in total."""
    return sums["gate_sum"].copy()
