"""Random saliency: the floor that every criterion must beat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from moeprune.score.base import Sums, score


@score("random", formula="uniform in [0, 1), drawn with the plan's seed", source="baseline of arXiv 2505.03531")
def random(sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
    """Independent uniform numbers; the statistics give only the shape."""
    return np.random.default_rng(seed).random(sums["count"].shape)
