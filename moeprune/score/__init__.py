"""Statistics to saliency: how much each expert matters. One file a criterion; imports no torch."""

from moeprune.score.base import SCORES, Score

# Each import registers its criterion.
from moeprune.score import ean, frequency, random, reap, soft_frequency  # noqa: F401  isort: skip

__all__ = ["SCORES", "Score"]
