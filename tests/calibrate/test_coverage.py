"""What a statistics file says of the text it rests on."""

from __future__ import annotations

import numpy as np
import pytest

from moeprune.calibrate.coverage import agreement, difference, layer_coverage, super_experts
from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError
from moeprune.plan.uniform import make_plan
from tests.fake_stats import facts, fake_stats


@pytest.fixture
def stats() -> Stats:
    """Two layers of four experts, and a third that no token reached."""
    stats = Stats.zeros(facts(num_layers=3, num_experts=4, top_k=1), domains=("code", "math"))
    stats.tokens[:] = [100, 50]
    stats.experts["count"][0, 0] = [70, 20, 10, 0]
    stats.experts["count"][1, 0] = [5, 40, 5, 0]
    stats.experts["count"][:, 1] = [[25] * 4, [10, 20, 15, 5]]
    stats.experts["max_abs"][:, :2] = [[[1, 2, 3, 0], [5, 4, 3, 2]], [[1, 900, 1, 0], [2, 8, 2, 2]]]
    return stats


def test_tokens_an_expert_by_domain(stats):
    first, second = layer_coverage(stats)
    assert first.tokens == {"code": (0, 15.0, 70), "math": (0, 5.0, 40)}
    assert first.starved == (2,) and first.never_routed == (3,)
    assert first.busiest == 75 / (150 / 4)
    assert second.never_routed == () and second.starved == (3,)
    assert second.tokens["code"] == (25, 25.0, 25)


def test_layers_that_no_token_reached_are_named(stats):
    assert stats.unseen_layers == ("model.layers.3",)
    assert [layer.layer for layer in layer_coverage(stats)] == ["model.layers.1", "model.layers.2"]
    assert fake_stats().unseen_layers == ()


def test_a_plan_warns_of_layers_whose_experts_were_chosen_by_id_alone(stats):
    warnings = make_plan(stats, score="frequency", keep_experts=2).warnings
    assert warnings[0] == (
        "no token was routed in model.layers.3: the kept experts there were chosen by their id alone. Calibrate on "
        "text that reaches them."
    )
    assert not any("by their id alone" in text for text in make_plan(stats, score="frequency", keep=1.0).warnings)


def test_the_super_expert_of_the_first_layers_is_found(stats):
    (found,) = super_experts(stats) or []
    assert (found.layer, found.expert, found.max_abs) == ("model.layers.1", 1, 900.0)


def test_a_plan_that_prunes_a_super_expert_warns_of_it_and_one_that_keeps_it_does_not(stats):
    """Expert 1 of the first layer is the busiest but one; the largest outputs of all are its."""
    (warning,) = [text for text in make_plan(stats, score="frequency", keep_experts=1).warnings if "super" in text]
    assert warning.startswith("super experts are pruned: model.layers.1 expert 1. Their outputs are far larger than")
    for kept in ({"keep_experts": 2}, {"keep": 1.0}):
        assert not any("super" in text for text in make_plan(stats, score="frequency", **kept).warnings)
    assert make_plan(stats, score="max-activations", keep_experts=1).layers[0].keep == (1,)


def test_a_large_output_of_a_late_layer_is_no_super_expert():
    """The definition is about the layers in which massive activations form; the last quarter is not among them."""
    stats = Stats.zeros(facts(num_layers=4, num_experts=100), domains=["text"])
    stats.experts["max_abs"][0] = 1.0
    stats.experts["max_abs"][0, 3, 7] = 1000.0
    assert super_experts(stats) == []
    stats.experts["max_abs"][0, 2, 7] = 900.0
    assert [(expert.layer, expert.expert) for expert in super_experts(stats) or []] == [("model.layers.3", 7)]


def test_experts_of_like_size_are_no_super_experts_and_absent_sizes_say_nothing():
    """400 experts with outputs of 1: two lie above the percentile, and none above a tenth of the largest."""
    stats = Stats.zeros(facts(num_layers=4, num_experts=100), domains=["text"])
    stats.experts["max_abs"][0] = 1.0
    stats.experts["max_abs"][0, 0, :2] = [1000.0, 50.0]
    assert [expert.max_abs for expert in super_experts(stats) or []] == [1000.0]
    del stats.experts["max_abs"]
    assert super_experts(stats) is None


def test_domains_that_rank_alike_and_domains_that_do_not():
    stats = Stats.zeros(facts(num_layers=1, num_experts=4), domains=("a", "b", "c", "empty"))
    stats.tokens[:3] = 100
    stats.experts["count"][:3, 0] = [[10, 20, 30, 40], [1, 2, 3, 4], [40, 30, 20, 10]]
    found = {pair.domains: pair for pair in agreement(stats, score="frequency")}
    assert found.keys() == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "b"].correlation == pytest.approx(1) and found["a", "b"].overlap == 1
    assert found["a", "c"].correlation == pytest.approx(-1) and found["a", "c"].overlap == 0


def test_statistics_do_not_differ_from_themselves():
    found = difference(fake_stats(), fake_stats())
    assert found["overlap"] == 1
    assert set(found["largest_difference"].values()) == {0.0}
    assert all(layer["correlation"] == pytest.approx(1) for layer in found["layers"])


def test_the_difference_names_the_experts_that_only_one_keeps():
    one, other = (Stats.zeros(facts(num_layers=1, num_experts=4), domains=["text"]) for _ in range(2))
    for stats, counts in ((one, [40, 30, 20, 10]), (other, [40, 5, 20, 10])):
        stats.tokens[0] = 100
        stats.experts["count"][0, 0] = counts
    del other.experts["gate_sum"]
    found = difference(one, other, score="frequency", keep=0.5)
    (layer,) = found["layers"]
    assert (layer["only_first"], layer["only_second"], layer["overlap"]) == ([1], [2], 0.5)
    assert found["largest_difference"]["count"] == 25 / 40
    assert found["largest_difference"]["gate_sum"] is None


def test_statistics_of_different_models_are_not_compared():
    with pytest.raises(StatsError, match=r"statistics of different models cannot be compared: tiny .* and big "):
        difference(fake_stats(), fake_stats(facts(name="big", fingerprint="cd" * 32)))


def test_a_file_with_domains_that_saw_nothing_is_described():
    stats = fake_stats(domains=("code", "math"))
    stats.tokens[1] = 0
    for name in stats.experts:
        stats.experts[name][1] = 0
    assert agreement(stats) == []
    assert layer_coverage(stats)[0].tokens["math"] == (0, 0.0, 0)
    assert np.isfinite(layer_coverage(stats)[0].load_entropy)
