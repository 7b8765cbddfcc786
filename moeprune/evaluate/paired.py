"""Means, ratios and paired differences with their standard errors.

Every number here is a ratio of sums over items, sum(x) / sum(w). For accuracy w is 1 for each item and the ratio is the
mean; for bits per byte x is the bits of a document and w its bytes. One formula therefore covers both, and a difference
between two models on the same items is the ratio of the differences.

The items are taken as a random sample from a larger population, so that the standard error says how much the number
would move with other items of the same kind. It says nothing about the choice of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratio(values: Sequence[float], *, weights: Sequence[float] | None = None) -> tuple[float, float | None]:
    """A ratio of sums and its linearised standard error.

    r = sum(x) / sum(w), and by the delta method s.e. = sqrt(n var(x - r w)) / sum(w) with the sample variance (ddof 1).
    Without weights this is the mean and sd / sqrt(n), exactly.

    Args:
        values: x, one for each item.
        weights: w, one for each item and positive; None for 1 each.

    Returns:
        The ratio, and its standard error, which is None for fewer than two items.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    assert x.ndim == 1 and x.shape == w.shape and x.size > 0, (x.shape, w.shape)
    total = w.sum()
    value = x.sum() / total
    if x.size < 2:
        return float(value), None
    return float(value), float(np.sqrt(x.size * np.var(x - value * w, ddof=1)) / total)


def paired_difference(
    values: Sequence[float], *, baseline: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float | None]:
    """The difference between two models on the same items, and its standard error.

    With d = x - x_baseline: difference = sum(d) / sum(w), s.e. = sqrt(n var(d - difference w)) / sum(w). For accuracy
    that is the mean of the per-item differences and sd(d) / sqrt(n). Pairing removes what makes an item easy or hard
    for both models, so this is far smaller than the two separate errors would suggest.

    Args:
        values: x of the model, one for each item.
        baseline: x of the baseline on the same items in the same order.
        weights: w of the items (bytes of each document), or None for 1 each.

    Returns:
        Model minus baseline, and its standard error, which is None for fewer than two items.
    """
    difference = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return ratio(difference.tolist(), weights=weights)
