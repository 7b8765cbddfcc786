"""EASY-EP: contributions, weighed by how far the experts turn the token they act on."""

from __future__ import annotations

from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score(
    "easy-ep",
    formula="sum over T of s g |f|, s = 1 - cos(x, x + y) of the token",
    source="arXiv 2504.06792",
    needs=("token_gated_norm_sum",),
)
def easy_ep(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Contributions to tokens whose residual stream x is turned by y, the sum of all experts' contributions.

    Domains are mixed by their tokens, as everywhere here; the paper takes the mean of scores normalised by domain.
    """
    return sums["token_gated_norm_sum"].copy()
