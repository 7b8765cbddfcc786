"""MoNE: how much an expert's output varies, times how often it is chosen."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score(
    "mone",
    formula="(sum of g over T) sqrt(sum over T of |f - m|^2 / (|T| - 1)), m = mean over T of f",
    source="arXiv 2507.00390",
    needs=("count", "gate_sum", "norm_sq_sum", "output_sum"),
)
def mone(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Access frequency times output deviation: an expert that always answers the same can be replaced by a constant.

    The frequency is the gate weight, as in the paper's code. 0 for experts that were chosen less than twice.
    """
    count = sums["count"]
    mean_sq = np.square(sums["output_sum"]).sum(axis=-1) / np.maximum(count, 1)
    scatter = np.maximum(sums["norm_sq_sum"] - mean_sq, 0)  # of equal outputs, 0 but for rounding
    return sums["gate_sum"] * np.sqrt(scatter / np.maximum(count - 1, 1)) * (count > 1)
