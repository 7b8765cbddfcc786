"""Statistics to saliency: how much each expert matters. One file a criterion; imports no torch."""

from moeprune.score.base import SCORES, Score

# Each import registers its criterion.
from moeprune.score import (  # noqa: F401  isort: skip
    ean,
    ean_mean,
    easy_ep,
    frequency,
    max_activations,
    mone,
    msan,
    random,
    reap,
    soft_frequency,
    weighted_ean,
    weighted_msan,
)

__all__ = ["SCORES", "Score"]
