"""Mixing domains: a share says how often a domain's tokens occur, however much of it was calibrated on."""

import numpy as np
import pytest

from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError
from tests.fake_stats import facts


@pytest.fixture
def stats() -> Stats:
    """One layer, three experts; 100 tokens of code, 300 of math, none of prose."""
    stats = Stats.zeros(facts(num_layers=1, num_experts=3, top_k=1), domains=("code", "math", "prose"))
    stats.tokens[:] = [100, 300, 0]
    stats.experts["count"][:2] = [[[50, 40, 10]], [[30, 0, 270]]]
    stats.experts["gate_sum"][:2] = [[[25, 20, 5]], [[6, 0, 54]]]
    stats.experts["max_abs"][:2] = [[[1, 7, 2]], [[5, 0, 3]]]
    return stats


def test_without_weights_the_sums_are_added_as_they_are(stats):
    mixed = stats.mixed()
    assert mixed.keys() == stats.experts.keys()
    assert mixed["count"].tolist() == [[80, 40, 280]]
    assert mixed["gate_sum"].tolist() == [[31, 20, 59]]
    assert mixed["max_abs"].tolist() == [[5, 7, 3]]


def test_a_share_is_of_tokens_not_of_calibration_text(stats):
    """3/4 code and 1/4 math of 400 tokens: 300 as in code (100 were seen), 100 as in math (300 were seen)."""
    mixed = stats.mixed({"code": 3.0, "math": 1.0})
    np.testing.assert_allclose(mixed["count"], [[50 * 3 + 30 / 3, 40 * 3, 10 * 3 + 270 / 3]], rtol=1e-12)
    np.testing.assert_allclose(mixed["gate_sum"], [[25 * 3 + 6 / 3, 20 * 3, 5 * 3 + 54 / 3]], rtol=1e-12)
    assert mixed["max_abs"].tolist() == [[5, 7, 3]]


def test_the_scale_of_the_weights_does_not_matter(stats):
    small, large = stats.mixed({"code": 0.3, "math": 0.1}), stats.mixed({"code": 300.0, "math": 100.0})
    for name in small:
        np.testing.assert_allclose(small[name], large[name], rtol=1e-12)


def test_shares_as_calibrated_change_nothing(stats):
    plain, weighted = stats.mixed(), stats.mixed({"code": 100.0, "math": 300.0})
    for name in plain:
        np.testing.assert_allclose(plain[name], weighted[name], rtol=1e-12)


@pytest.mark.parametrize("weights", [{"code": 2.0}, {"code": 2.0, "math": 0.0}, {"code": 1.0, "prose": 0.0}])
def test_a_domain_of_weight_zero_takes_no_part_not_even_in_the_maximum(stats, weights):
    mixed = stats.mixed(weights)
    np.testing.assert_allclose(mixed["count"], [[200, 160, 40]], rtol=1e-12)
    assert mixed["max_abs"].tolist() == [[1, 7, 2]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cod": 1.0}, "unknown domain 'cod'. Did you mean 'code'? Known: code, math, prose."),
        ({"xyz": 1.0}, "unknown domain 'xyz'. Known: code, math, prose."),
        ({"code": -0.5}, "domain 'code': expected a weight of 0 or more, got -0.5."),
        ({"code": float("nan")}, "domain 'code': expected a weight of 0 or more, got nan."),
        ({"math": float("inf")}, "domain 'math': expected a weight of 0 or more, got inf."),
        ({"code": 0.0, "math": 0.0}, "all domain weights are 0."),
        ({}, "all domain weights are 0."),
        ({"code": 1.0, "prose": 1.0}, "no token was seen of domain 'prose'."),
    ],
)
def test_refused_weights(stats, weights, message):
    with pytest.raises(StatsError) as error:
        stats.mixed(weights)
    assert str(error.value) == message


@pytest.mark.parametrize("weights", [None, {"code": 1.0}])
def test_statistics_of_no_token_are_refused(weights):
    with pytest.raises(StatsError) as error:
        Stats.zeros(facts(), domains=["code"]).mixed(weights)
    assert str(error.value) == "these statistics saw no token. Calibrate on some text."
