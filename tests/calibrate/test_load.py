"""How evenly tokens fall on experts."""

import warnings

import numpy as np
import pytest

from moeprune.calibrate.load import load_entropy, load_share

COUNTS = np.array([[4.0, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _no_numpy_warning():
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_shares_sum_to_one_and_an_unused_layer_has_none():
    assert load_share(COUNTS).tolist() == [[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0] * 4]


def test_entropy_is_one_for_an_even_load_and_zero_for_a_single_expert():
    np.testing.assert_allclose(load_entropy(COUNTS), [1, 0, 0.5, 0], atol=1e-12)
