"""How well scores repeat on the other half of the text."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from moeprune.calibrate.reliability import kept, overlap, rank_correlation, reliability, split_half, usable_scores
from moeprune.calibrate.stats import Stats
from moeprune.errors import PlanError, StatsError
from moeprune.plan.uniform import best_experts
from tests.calibrate.reference import random_rows
from tests.calibrate.reference_more import observe_all
from tests.fake_stats import facts, fake_stats
from tests.models import build


def halves_of(even, odd, **model) -> Stats:
    """Statistics of one layer whose experts were chosen so often in either half."""
    stats = Stats.zeros(facts(num_layers=1, num_experts=len(even), **model), domains=["text"], halves=True)
    stats.halves["count"][:, 0, 0] = [even, odd]
    stats.halves["tokens"][:, 0] = [sum(even), sum(odd)]
    stats.tokens[0] = sum(even) + sum(odd)
    stats.add_up()
    stats.check("test")
    return stats


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_that_of_scipy_also_with_ties(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 20).astype(float), rng.normal(size=20)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, rel=1e-12)


@pytest.mark.parametrize("n_group", [1, 4])
def test_the_kept_set_is_that_of_a_plan(n_group):
    saliency = np.random.default_rng(0).integers(0, 5, (1, 16)).astype(float)
    expected = best_experts(saliency, count=8, n_group=n_group)[0]
    assert np.flatnonzero(kept(saliency[0], keep=8, n_group=n_group)).tolist() == expected.tolist()


def test_a_known_case_by_hand():
    """Ranks 1..6 and two of them swapped: rho = 1 - 6 * 2 / (6 * 35); Spearman-Brown 2 r / (1 + r)."""
    found = split_half(halves_of([10, 20, 30, 40, 50, 60], [10, 20, 40, 30, 50, 60]), score="frequency")
    rho = 1 - 12 / 210
    assert found.correlation == pytest.approx((rho,))
    assert found.whole == pytest.approx((2 * rho / (1 + rho),))
    assert found.keep == 3
    assert found.overlap == pytest.approx((2 / 3,)), "experts 3, 4, 5 and experts 2, 4, 5"
    assert found.mean == found.whole[0]


def test_halves_that_agree_are_reliable_and_those_that_do_not_are_not():
    same = halves_of([1, 2, 3, 4], [10, 20, 30, 40])
    assert reliability(same, score="frequency") == pytest.approx(1.0)
    assert split_half(same, score="frequency").mean_overlap == 1.0
    assert reliability(halves_of([1, 2, 3, 4], [40, 30, 20, 10]), score="frequency") == -1.0


def test_more_text_is_more_reliable_and_the_prediction_fits():
    """Counts drawn from fixed shares: doubling the text must give about what Spearman-Brown says."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(64, 30.0))

    def drawn(tokens: int) -> list[float]:
        runs = [split_half(halves_of(*rng.multinomial(tokens, shares, 2).astype(float)), score="frequency")
                for _ in range(40)]  # fmt: skip
        return [float(np.mean([run.correlation[0] for run in runs])), float(np.mean([run.mean for run in runs]))]

    half, predicted = drawn(2000)
    whole, _ = drawn(4000)
    assert half < whole - 0.1, "more text must matter here"
    assert predicted == pytest.approx(whole, abs=0.03)


def test_layers_that_only_one_half_reached_are_left_out_and_no_text_is_not_reliable():
    one_sided = halves_of([1, 2, 3, 4], [0, 0, 0, 0])
    assert split_half(one_sided, score="frequency").layers == ()
    assert reliability(one_sided, score="frequency") == 0.0


def test_the_score_that_ignores_the_text_is_refused():
    with pytest.raises(StatsError, match="'random' does not look at the text"):
        reliability(halves_of([1, 2], [2, 1]), score="random")


def test_refusals():
    with pytest.raises(PlanError, match="unknown score 'raep'"):
        reliability(halves_of([1, 2], [2, 1]), score="raep")
    with pytest.raises(StatsError, match="'mone' needs output_sum, which is not kept for the even and the odd rows"):
        reliability(halves_of([1, 2], [2, 1]), score="mone")
    with pytest.raises(StatsError, match="do not tell even from odd rows"):
        reliability(fake_stats(), score="reap")


def test_every_score_of_a_real_pass_has_its_reliability():
    stats = observe_all(build("qwen3_moe"), random_rows("text", rows=20))
    names = usable_scores(stats)
    assert {"reap", "easy-ep", "ean", "frequency"} <= set(names) and "random" not in names
    for name in names:
        found = split_half(stats, score=name)
        assert found.layers == stats.model.layers
        assert -1 <= found.mean <= 1 and 0 <= found.mean_overlap <= 1


def test_overlap_of_disjoint_and_equal_sets():
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1]), keep=2) == 0.0
    assert overlap(np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 7, 8]), keep=2) == 1.0
