"""Counts with which a model cannot route are refused, and the way out that the message names works."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.errors import PlanError
from moeprune.plan.plan import check_sizes
from tests.fake_stats import facts

PLAIN = facts(num_experts=10, top_k=3)
GROUPED = facts(num_experts=16, top_k=5, n_group=4, topk_group=2)


@pytest.mark.parametrize(
    ("model", "num_experts", "top_k", "message"),
    [
        (PLAIN, 0, 1, "cannot keep 0 experts a layer: tiny has 10."),
        (PLAIN, -1, 1, "cannot keep -1 experts a layer: tiny has 10."),
        (PLAIN, 11, 3, "cannot keep 11 experts a layer: tiny has 10."),
        (PLAIN, 8, 0, "cannot use 0 active experts: expected 1 to 3, the top-k of tiny."),
        (PLAIN, 8, 4, "cannot use 4 active experts: expected 1 to 3, the top-k of tiny."),
        (PLAIN, 2, 3, "cannot route to 3 of 2 experts. Keep at least 3, or lower --top-k to 2."),
        (
            GROUPED, 14, 5,
            "cannot keep 14 experts a layer: tiny routes in 4 groups of equal size. Keep 12 or 16.",
        ),
        (
            GROUPED, 9, 4,
            "cannot keep 9 experts a layer: tiny routes in 4 groups of equal size. Keep 8 or 12.",
        ),
        (
            GROUPED, 4, 2,
            "cannot keep 4 experts a layer: a group is scored by its two best experts, so each of the 4 groups "
            "needs 2. Keep at least 8.",
        ),
        (
            GROUPED, 8, 5,
            "cannot route to 5 experts: a token may use 2 groups of 2 experts. Keep at least 12, "
            "or lower --top-k to 4.",
        ),
    ],
)  # fmt: skip
def test_refused_counts(model, num_experts, top_k, message):
    with pytest.raises(PlanError) as error:
        check_sizes(model, num_experts=num_experts, top_k=top_k)
    assert str(error.value) == message


def test_one_expert_a_group_is_enough_where_a_group_is_worth_its_best_expert():
    """DeepSeek-V2 was once held to the two experts a group that only DeepSeek-V3's score needs."""
    model = facts(num_experts=16, top_k=2, n_group=4, topk_group=2, group_score="max")
    check_sizes(model, num_experts=4, top_k=2)
    with pytest.raises(PlanError, match=r"of equal size\. Keep 4 or 8\.$"):
        check_sizes(model, num_experts=6, top_k=2)


def test_without_groups_only_the_top_k_limits_the_number():
    check_sizes(GROUPED, num_experts=5, top_k=5, n_group=1)
    with pytest.raises(PlanError, match=r"^cannot route to 5 of 4 experts"):
        check_sizes(GROUPED, num_experts=4, top_k=5, n_group=1)


@pytest.mark.parametrize("num_experts", [2, 3, 5, 6, 7])
def test_a_number_that_is_refused_next_is_not_suggested(num_experts):
    """6 of 16 experts in 4 groups once read "Keep 4 or 8", and 4 was refused: a group needs two."""
    with pytest.raises(PlanError, match=r"of equal size\. Keep 8\.$"):
        check_sizes(GROUPED, num_experts=num_experts, top_k=2)


@pytest.mark.parametrize(
    ("model", "num_experts", "top_k"),
    [(PLAIN, 10, 3), (PLAIN, 1, 1), (PLAIN, 3, 3), (GROUPED, 16, 5), (GROUPED, 8, 4), (GROUPED, 12, 5)],
)
def test_possible_counts(model, num_experts, top_k):
    check_sizes(model, num_experts=num_experts, top_k=top_k)


@given(
    n_group=st.integers(1, 4), size=st.integers(2, 8), num_experts=st.integers(1, 32), top_k=st.integers(1, 12),
    group_score=st.sampled_from(["top2", "max"]), data=st.data(),
)  # fmt: skip
def test_following_the_advice_of_refusals_ends_with_a_number_that_is_accepted(
    n_group, size, num_experts, top_k, group_score, data
):
    topk_group = data.draw(st.integers(1, n_group))
    top_k = min(top_k, topk_group * size)
    model = facts(
        num_experts=n_group * size, top_k=top_k, n_group=n_group, topk_group=topk_group, group_score=group_score
    )
    tried = []
    while num_experts not in tried:
        tried.append(num_experts)
        try:
            check_sizes(model, num_experts=num_experts, top_k=top_k)
            return
        except PlanError as error:
            advised = re.search(r"Keep (?:at least )?(?:\d+ or )?(\d+)|has (\d+)\.$", str(error))
            assert advised, str(error)
            num_experts = int(advised[1] or advised[2])
    pytest.fail(f"the advice went in circles: {tried}")
