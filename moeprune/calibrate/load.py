"""Router load: how evenly tokens fall on experts. Imports no torch."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy import ndarray


def load_share(counts: Float64[ndarray, "layers experts"]) -> Float64[ndarray, "layers experts"]:
    """Each expert's share of the routed tokens of its layer; every row sums to 1."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def load_entropy(counts: Float64[ndarray, "layers experts"]) -> Float64[ndarray, " layers"]:
    """Entropy of the load of each layer divided by that of an even load: 1 is even, 0 is one expert for everything."""
    share = load_share(counts)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    return -terms.sum(axis=-1) / np.log(max(counts.shape[-1], 2))
