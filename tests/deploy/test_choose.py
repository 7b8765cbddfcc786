"""A number of experts near the one asked for, with which an engine has no trouble."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.deploy.advise import advise
from moeprune.deploy.check import check
from moeprune.deploy.choose import choose_count, require_count
from moeprune.deploy.facts import facts_of_model
from moeprune.deploy.serving import servings
from moeprune.errors import PlanError
from moeprune.plan.uniform import make_plan
from tests.fake_stats import facts, fake_stats

QWEN = facts(num_experts=128, top_k=8)
DEEPSEEK = facts(
    num_experts=256, top_k=8, n_group=8, topk_group=4, scoring="sigmoid", bias="correction", renormalised=True
)


def chosen(model, asked, *engines, n_group=None, **spread) -> int:
    return choose_count(facts_of_model(model, n_group=n_group), servings(engines, **spread), asked=asked).num_experts


def test_a_number_that_fits_is_kept():
    choice = choose_count(facts_of_model(QWEN), servings(["vllm"], ep=8), asked=96)
    assert (choice.num_experts, choice.avoids, str(choice)) == (96, (), "96 experts fit as asked.")


def test_the_reason_for_another_number_is_what_was_wrong_with_the_first():
    choice = choose_count(facts_of_model(QWEN), servings(["sglang"], ep=16, tp=16), asked=90)
    assert choice.num_experts == 96
    assert str(choice).startswith("96 experts instead of 90: 90 experts on 16 expert-parallel ranks: SGLang asserts an")


def test_devices_and_groups_are_shared_evenly():
    assert chosen(DEEPSEEK, 180, "sglang", ep=16, tp=16) == 176
    assert chosen(DEEPSEEK, 180, "sglang", ep=48, tp=48) == 192
    assert chosen(DEEPSEEK, 180, "sglang", ep=12, tp=12, n_group=1) == 192  # 168 is as near: the larger one
    assert chosen(DEEPSEEK, 10, "transformers") == 16


def test_who_asks_for_fewer_experts_does_not_get_all_of_them():
    assert chosen(QWEN, 126, "vllm") == 120
    assert chosen(QWEN, 128, "vllm") == 128


def test_redundant_experts_count_where_ranks_are_filled():
    assert chosen(QWEN, 100, "sglang", ep=8, tp=8, redundant=4) % 8 == 4


def test_several_engines_at_once():
    number = chosen(DEEPSEEK, 100, "vllm", "sglang", "llama.cpp", "transformers", ep=4, tp=4)
    assert check(facts_of_model(DEEPSEEK, num_experts=number), servings(ep=4, tp=4)).ok


def test_no_number_fits():
    model = facts(num_experts=8, top_k=2)
    with pytest.raises(PlanError) as error:
        chosen(model, 6, "sglang", ep=16)
    assert str(error.value) == (
        "no number of experts fits sglang. With 6: 6 experts on 16 expert-parallel ranks: SGLang asserts an even "
        "share. Use --ep 8, or use --ep-num-redundant-experts 10."
    )


def test_where_no_number_fits_what_stands_in_the_way_of_all_is_told():
    """And not that 45 experts are shared unevenly, which 48 would not be."""
    with pytest.raises(PlanError) as error:
        chosen(facts(num_experts=64, top_k=8), 45, "sglang", ep=8, tp=4)
    assert str(error.value) == (
        "no number of experts fits sglang. With 48: --ep 8 with --tp 4: SGLang's expert-parallel size divides its "
        "tensor-parallel size. Use --ep 4."
    )


def test_no_number_below_the_top_k_is_advised():
    model = facts_of_model(facts(num_experts=60, top_k=12), num_experts=13)
    with pytest.raises(PlanError, match=r"Keep 20, or plan without --for\.$"):
        require_count(model, servings(["sglang"], ep=10, tp=10))


@given(
    asked=st.integers(1, 64), ep=st.sampled_from([1, 2, 3, 4, 6, 8, 16]), n_group=st.sampled_from([1, 2, 4, 8]),
    engine=st.sampled_from(["vllm", "sglang", "llama.cpp", "transformers"]),
)  # fmt: skip
def test_the_chosen_number_is_sound_and_as_near_as_errors_allow(asked, ep, n_group, engine):
    """Against a list of all sound numbers made by hand."""
    model = facts(
        num_experts=64, top_k=4, n_group=n_group, topk_group=max(1, n_group // 2), scoring="sigmoid", bias="correction"
    )
    number = chosen(model, asked, engine, ep=ep, tp=ep)
    least = max(4, ep) if engine in ("vllm", "sglang") else 4
    sound = [
        n
        for n in range(least, 65)
        if n % n_group == 0
        and (n_group == 1 or (n >= 2 * n_group and max(1, n_group // 2) * (n // n_group) >= 4))
        and (engine not in ("sglang", "transformers") or n % ep == 0)
    ]
    assert number in sound
    assert asked == 64 or number < 64
    nearest = min(abs(n - asked) for n in sound if asked == 64 or n < 64)
    assert abs(number - asked) <= max(nearest, math.lcm(8, n_group, ep))


def test_a_number_given_by_hand_is_refused_with_the_nearest_that_fit():
    with pytest.raises(PlanError) as error:
        require_count(facts_of_model(DEEPSEEK, num_experts=184), servings(["sglang"], ep=16, tp=16))
    assert str(error.value).startswith("cannot keep 184 experts a layer for sglang: 184 experts on 16 expert-parallel")
    assert str(error.value).endswith("Keep 176 or 192, or plan without --for.")
    require_count(facts_of_model(DEEPSEEK, num_experts=184), servings(["vllm"], ep=16))  # uneven there, and no error


def test_a_plan_takes_the_number_and_says_why():
    stats = fake_stats(facts(num_experts=64, top_k=4))
    plan = make_plan(stats, score="reap", keep=0.7, where=servings(["sglang"], ep=8, tp=8))
    assert plan.num_experts == 48
    assert plan.method["for"][0] == {"engine": "sglang", "tp": 8, "ep": 8, "redundant": 0, "gpu": None}
    assert plan.method["chosen"].startswith("48 experts instead of 45: ")
    with pytest.raises(PlanError, match="cannot keep 45 experts a layer for sglang"):
        make_plan(stats, score="reap", keep_experts=45, where=servings(["sglang"], ep=8, tp=8))
    assert make_plan(stats, score="reap", keep_experts=45, where=servings(["vllm"])).num_experts == 45


def test_advice_names_only_what_pruning_brought():
    model = facts(num_experts=60, top_k=4)  # as Qwen1.5-MoE: no multiple of 8 to begin with
    before = facts_of_model(model)
    assert advise(facts_of_model(model, num_experts=45), before=before) == []
    assert {finding.rule for finding in advise(facts_of_model(model, num_experts=45))} == {
        "fused-top-k", "multiple-of-eight",
    }  # fmt: skip
    qwen = advise(facts_of_model(QWEN, num_experts=45), before=facts_of_model(QWEN))
    assert [(finding.rule, finding.engines) for finding in qwen] == [
        ("fused-top-k", ("vllm", "sglang", "llama.cpp")), ("multiple-of-eight", ("vllm", "sglang")),
    ]  # fmt: skip


def test_advice_for_some_engines_is_about_those():
    found = advise(facts_of_model(QWEN, num_experts=45), before=facts_of_model(QWEN), where=servings(["llama.cpp"]))
    assert [finding.engines for finding in found] == [("llama.cpp",)]
