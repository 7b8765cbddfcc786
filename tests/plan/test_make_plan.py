"""From statistics to a plan: the arguments, the record of how it was made, and the warnings."""

import numpy as np
import pytest

from moeprune.calibrate.stats import Stats
from moeprune.errors import PlanError, StatsError
from moeprune.plan.uniform import make_plan
from tests.fake_stats import facts, fake_stats


def stats_with(counts, *, tokens=1000, **model) -> Stats:
    """One layer and one domain in which each expert was chosen as often as ``counts`` says."""
    stats = Stats.zeros(facts(num_layers=1, num_experts=len(counts), **model), domains=["text"])
    stats.tokens[:] = tokens
    stats.experts["count"][0, 0] = counts
    return stats


def test_the_experts_with_the_highest_score_stay():
    stats = stats_with([5, 900, 40, 900, 70, 60, 1, 900, 80, 2])
    plan = make_plan(stats, score="frequency", keep=0.4, top_k=2)
    assert plan.keep == {"model.layers.1": (1, 3, 7, 8)}
    assert (plan.num_experts, plan.top_k) == (4, 2)


def test_groups_keep_the_same_number():
    stats = stats_with([9, 8, 7, 6, 90, 80, 70, 60, 1, 2, 3, 4], n_group=3, topk_group=2)
    assert make_plan(stats, score="frequency", keep_experts=6).keep == {"model.layers.1": (0, 1, 4, 5, 10, 11)}


def test_by_default_all_experts_and_the_models_own_top_k():
    plan = make_plan(fake_stats(), score="reap")
    assert plan.keep == {f"model.layers.{layer}": tuple(range(10)) for layer in (1, 2)}
    assert (plan.num_experts, plan.top_k) == (10, 3)
    assert plan.warnings == ()


def test_domains_are_mixed_as_asked():
    stats = fake_stats(domains=("code", "math"))
    for at, expert in ((0, 2), (1, 6)):
        stats.experts["count"][at] = 1
        stats.experts["count"][at, :, expert] = 4000
    for domain, expert in (("code", 2), ("math", 6)):
        plan = make_plan(stats, score="frequency", keep_experts=1, top_k=1, domains={domain: 1.0})
        assert set(plan.keep.values()) == {(expert,)}


def test_the_plan_records_how_it_was_made():
    plan = make_plan(
        fake_stats(),
        score="reap",
        keep=0.75,
        top_k=2,
        domains={"code": 3.0, "math": 1.0},
        seed=4,
        stats_sha256="ef" * 32,
    )
    assert plan.model == facts()
    assert plan.method == {
        "score": "reap", "formula": "mean over T of g |f|", "source": "arXiv 2510.13999", "keep": 0.8,
        "domains": {"code": 3.0, "math": 1.0}, "seed": 4, "calibration_tokens": 12000, "stats_sha256": "ef" * 32,
    }  # fmt: skip


def test_the_same_arguments_give_the_same_plan_and_another_seed_another_one():
    first, again, other = (make_plan(fake_stats(), score="random", keep=0.5, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert first.keep != other.keep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"score": "reapp"},
            "unknown score 'reapp'. Did you mean 'reap'? Known: ean, ean-mean, easy-ep, frequency, max-activations, "
            "mone, msan, random, reap, soft-frequency, weighted-ean, weighted-msan.",
        ),
        ({"keep": 0.5, "keep_experts": 5}, "got --keep 0.5 and --keep-experts 5. Give one of them."),
        ({"keep": 1.5}, "--keep 1.5: expected a share above 0 and at most 1. For a number, use --keep-experts."),
        ({"keep_experts": 11}, "cannot keep 11 experts a layer: tiny has 10."),
        ({"keep_experts": 0}, "cannot keep 0 experts a layer: tiny has 10."),
        ({"keep": 0.2}, "cannot route to 3 of 2 experts. Keep at least 3, or lower --top-k to 2."),
        ({"top_k": 4}, "cannot use 4 active experts: expected 1 to 3, the top-k of tiny."),
        ({"top_k": 0}, "cannot use 0 active experts: expected 1 to 3, the top-k of tiny."),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(PlanError) as error:
        make_plan(fake_stats(), **{"score": "reap"} | arguments)
    assert str(error.value) == message


def test_an_unknown_domain():
    with pytest.raises(StatsError, match=r"^unknown domain 'cod'\. Did you mean 'code'\? Known: code, math\.$"):
        make_plan(fake_stats(), score="reap", domains={"cod": 1.0})


EVEN = [300] * 16


def test_a_plan_without_reason_for_doubt_warns_of_nothing():
    assert make_plan(stats_with(EVEN), score="frequency", keep_experts=8).warnings == ()


@pytest.mark.parametrize(("least", "warned"), [(31, True), (32, False)])
def test_kept_experts_that_saw_little_text_are_counted(least, warned):
    stats = stats_with([300] * 6 + [least] * 2 + [0] * 8)
    warnings = make_plan(stats, score="frequency", keep_experts=8).warnings
    assert warnings == (
        (
            "2 of the 8 kept experts saw fewer than 32 calibration tokens; their saliency is a guess. "
            "Calibrate on more text.",
        )
        if warned
        else ()
    )


def test_little_text_is_no_matter_where_every_expert_stays():
    assert make_plan(stats_with([1] * 16), score="frequency", top_k=2).warnings == ()


def test_mixing_does_not_make_little_text_look_like_much():
    """Shares of domains once scaled the 10 tokens of an expert in a small domain beyond the limit of 32."""
    stats = Stats.zeros(facts(num_layers=1, num_experts=16), domains=["small", "large"])
    stats.tokens[:] = [100, 10_000]
    stats.experts["count"][:, 0] = [[10] * 16, [1000] * 16]
    only_small = make_plan(stats, score="frequency", keep_experts=8, domains={"small": 1.0})
    assert [warning.partition(" calibration")[0] for warning in only_small.warnings] == [
        "8 of the 8 kept experts saw fewer than 32"
    ]
    assert make_plan(stats, score="frequency", keep_experts=8, domains={"small": 1.0, "large": 1.0}).warnings == ()


def test_a_router_that_does_not_renormalise_is_named_with_what_it_loses():
    stats = stats_with([600] * 8 + [200] * 8, renormalised=False)
    assert make_plan(stats, score="frequency", keep_experts=8).warnings == (
        "this router takes a softmax over all experts and does not renormalise the top-k: without the pruned experts "
        "the gate weights of the others grow. 25% of the routed tokens chose a pruned expert.",
    )
    assert make_plan(stats, score="frequency", top_k=2).warnings == ()


@pytest.mark.parametrize(
    "routing",
    [
        {"renormalised": True},
        {"renormalised": None},
        {"scoring": "sigmoid", "renormalised": False},
        {"scoring": "unknown", "renormalised": False},
    ],
)
def test_other_routers_lose_nothing(routing):
    assert make_plan(stats_with(EVEN, **routing), score="frequency", keep_experts=8).warnings == ()


def test_a_bias_on_a_softmax_changes_even_the_selection():
    """ernie4_5_moe: the bias was tuned against probabilities that grow when experts are dropped."""
    stats = stats_with([600] * 8 + [200] * 8, bias="correction")
    (warning,) = make_plan(stats, score="frequency", keep_experts=8).warnings
    assert "tokens choose others also among the kept experts. 25% of the routed tokens" in warning
    assert make_plan(stats, score="frequency", top_k=2).warnings == ()
    sigmoid = stats_with([600] * 8 + [200] * 8, bias="correction", scoring="sigmoid")
    assert make_plan(sigmoid, score="frequency", keep_experts=8).warnings == ()


def test_a_router_that_has_nothing_left_to_choose():
    plan = make_plan(stats_with(EVEN, top_k=8), score="frequency", keep_experts=8)
    assert plan.warnings == ("every token uses all 8 experts: the router only weighs them.",)


def test_all_warnings_at_once():
    stats = stats_with(np.arange(16), renormalised=False, top_k=4)
    plan = make_plan(stats, score="frequency", keep_experts=4)
    assert [warning.split()[0] for warning in plan.warnings] == ["4", "this", "every"]
