"""Every criterion against its formula, written out a second time."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import moeprune.score
from moeprune.errors import PlanError, StatsError
from moeprune.score import SCORES
from tests.fake_stats import fake_stats

SUMS = fake_stats().mixed()
SUMS["output_sum"] = np.stack([0.02 * SUMS["norm_sum"], 0.01 * SUMS["gate_sum"]], axis=-1)
KNOWN = (
    "ean, ean-mean, easy-ep, frequency, max-activations, mone, msan, random, reap, soft-frequency, weighted-ean, "
    "weighted-msan"
)


def by_hand(name: str, layer: int, expert: int) -> float:
    count, gate_sum, norm_sum, gated, squares, turned = (
        SUMS[key][layer, expert]
        for key in ("count", "gate_sum", "norm_sum", "gated_norm_sum", "norm_sq_sum", "token_gated_norm_sum")
    )
    mean = SUMS["output_sum"][layer, expert] / max(count, 1)
    return {
        "frequency": count,
        "soft-frequency": gate_sum,
        "ean": norm_sum,
        "ean-mean": norm_sum / count if count else 0.0,
        "easy-ep": turned,
        "mone": gate_sum * np.sqrt(max(squares - count * (mean @ mean), 0.0) / max(count - 1, 1)),
        "max-activations": SUMS["max_abs"][layer, expert],
        "msan": squares / count if count else 0.0,
        "weighted-ean": gated,
        "weighted-msan": SUMS["gated_norm_sq_sum"][layer, expert] / count if count else 0.0,
        "reap": gated / count if count else 0.0,
    }[name]


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_a_criterion_is_its_formula(name):
    saliency = SCORES.get(name).function(SUMS, seed=0)
    expected = [[by_hand(name, layer, expert) for expert in range(10)] for layer in range(2)]
    np.testing.assert_allclose(saliency, expected, rtol=1e-12)
    assert saliency.dtype == np.float64


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_an_expert_that_was_never_chosen_matters_least_and_warns_of_nothing(name):
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        saliency = SCORES.get(name).function(SUMS, seed=0)
    assert (SUMS["count"][:, -1] == 0).all()
    assert (saliency[:, -1] == 0).all()
    assert (saliency[:, :-1] > 0).all()


def test_mone_is_the_deviation_of_the_outputs_times_the_gate():
    """Against the unbiased variance that numpy computes from the outputs themselves."""
    rng = np.random.default_rng(0)
    outputs = [
        rng.normal(size=(40, 6)),
        np.ones((40, 6)) * 1.7,
        rng.normal(5.0, 1e-3, (40, 6)),
        rng.normal(size=(1, 6)),
    ]
    gates = np.array([12.0, 30.0, 9.0, 0.5])
    sums = {
        "count": np.array([[float(len(f)) for f in outputs]]),
        "gate_sum": gates[None],
        "norm_sq_sum": np.array([[np.square(f).sum() for f in outputs]]),
        "output_sum": np.array([[f.sum(axis=0) for f in outputs]]),
    }
    expected = gates * [np.sqrt(f.var(axis=0, ddof=1).sum()) if len(f) > 1 else 0.0 for f in outputs]
    np.testing.assert_allclose(SCORES.get("mone").function(sums, seed=0)[0], expected, rtol=1e-8, atol=1e-5)


def test_mone_needs_the_merge_level_and_no_mix_of_domains():
    stats = fake_stats()
    with pytest.raises(StatsError, match=r"needs output_sum, which only `moeprune calibrate --stats merge` gives"):
        SCORES.get("mone").saliency(stats)
    stats.statistics, stats.more["output_sum"] = "merge", SUMS["output_sum"]
    np.testing.assert_array_equal(SCORES.get("mone").saliency(stats), SCORES.get("mone").function(SUMS, seed=0))
    with pytest.raises(StatsError, match="summed over all domains together"):
        SCORES.get("mone").saliency(stats, domains={"code": 1.0})
    assert [SCORES.get(name).level for name in ("random", "reap", "mone")] == ["standard", "standard", "merge"]


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_criterion_leaves_the_statistics_alone(name):
    """Returning an array of the statistics itself would let a later stage change them."""
    sums = {key: array.copy() for key, array in SUMS.items()}
    SCORES.get(name).function(sums, seed=0)[:] = -1
    for key, array in SUMS.items():
        np.testing.assert_array_equal(sums[key], array, err_msg=key)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_only_random_depends_on_the_seed(name):
    score = SCORES.get(name).function
    np.testing.assert_array_equal(score(SUMS, seed=0), score(SUMS, seed=1))


def test_random_depends_on_the_seed_alone():
    score = SCORES.get("random").function
    first = score(SUMS, seed=0)
    np.testing.assert_array_equal(first, score(fake_stats(seed=9).mixed(), seed=0))
    assert (first != score(SUMS, seed=1)).all()
    assert first.shape == (2, 10) and ((first >= 0) & (first < 1)).all()
    assert len(np.unique(first)) == first.size


def test_every_file_is_a_criterion_of_the_same_name():
    files = {file.stem for file in Path(moeprune.score.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {name.replace("-", "_") for name in SCORES} == files


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_criterion_says_what_it_computes_and_who_proposed_it(name):
    score = SCORES.get(name)
    assert score.name == name
    assert score.formula and "arXiv" in score.source
    assert score.function.__doc__


@pytest.mark.parametrize(
    ("name", "hint"),
    [("raep", "Did you mean 'reap'? "), ("soft_frequency", "Did you mean 'soft-frequency'? "), ("x", "")],
)
def test_an_unknown_criterion(name, hint):
    with pytest.raises(PlanError) as error:
        SCORES.get(name)
    assert str(error.value) == f"unknown score {name!r}. {hint}Known: {KNOWN}."


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_criterion_reads_exactly_what_it_says_it_needs(name):
    score = SCORES.get(name)
    needed = {key: SUMS[key] for key in score.needs}
    np.testing.assert_array_equal(score.function(needed, seed=0), score.function(SUMS, seed=0))
    for key in needed:
        with pytest.raises(KeyError, match=key):
            score.function({other: array for other, array in needed.items() if other != key}, seed=0)


@pytest.mark.parametrize("name", sorted(name for name in SCORES if SCORES.get(name).by_domain))
def test_the_saliency_of_statistics_is_that_of_their_mixed_sums(name):
    stats = fake_stats()
    score, weights = SCORES.get(name), {"code": 0.7, "math": 0.3}
    expected = score.function(stats.mixed(weights), seed=3)
    np.testing.assert_array_equal(score.saliency(stats, domains=weights, seed=3), expected)


@pytest.fixture
def partial():
    """Statistics of a model whose experts' unweighted outputs cannot be seen."""
    stats = fake_stats()
    stats.model = stats.model.model_copy(update={"model_type": "llama4_text"})
    for name in ("norm_sum", "norm_sq_sum", "max_abs"):
        del stats.experts[name]
    return stats


def test_a_criterion_that_needs_an_absent_sum_names_those_that_do_not(partial):
    with pytest.raises(StatsError) as error:
        SCORES.get("ean").saliency(partial)
    assert str(error.value) == (
        "the score 'ean' (sum over T of |f|) needs norm_sum, which calibration does not give for llama4_text. "
        "Use one of: easy-ep, frequency, random, reap, soft-frequency, weighted-ean, weighted-msan."
    )


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"ean", "ean-mean", "max-activations", "mone", "msan"}))
def test_a_criterion_that_needs_no_absent_sum_is_computed(partial, name):
    np.testing.assert_array_equal(SCORES.get(name).saliency(partial), SCORES.get(name).saliency(fake_stats()))
