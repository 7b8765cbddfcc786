"""The kept experts: properties that hold for every saliency, and the share that a person writes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import PlanError
from moeprune.plan.plan import num_to_keep
from moeprune.plan.uniform import best_experts
from tests.fake_stats import facts


@st.composite
def choices(draw):
    """(saliency, count, n_group); few distinct values, so that ties are common."""
    n_group, size, layers = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    values = st.sampled_from([0.0, 1.0, 2.0, 1e-300, 1e300]) | st.floats(0, 100)
    flat = draw(st.lists(values, min_size=layers * n_group * size, max_size=layers * n_group * size))
    return np.array(flat).reshape(layers, n_group * size), draw(st.integers(1, size)) * n_group, n_group


@settings(max_examples=150, deadline=None)
@given(choices())
def test_kept_experts_are_the_best_of_each_group_ascending_and_ties_go_to_the_lower_id(choice):
    saliency, count, n_group = choice
    chosen = best_experts(saliency, count=count, n_group=n_group)
    size = saliency.shape[1] // n_group
    assert len(chosen) == len(saliency)
    for row, ids in zip(saliency, chosen, strict=True):
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert len(ids) == count
        for group in range(n_group):
            members = range(group * size, (group + 1) * size)
            best = sorted(members, key=lambda expert: (-row[expert], expert))[: count // n_group]
            assert [i for i in ids.tolist() if i in members] == sorted(best)


@settings(max_examples=50, deadline=None)
@given(choices())
def test_keeping_fewer_keeps_a_subset(choice):
    saliency, count, n_group = choice
    for more, fewer in zip(
        best_experts(saliency, count=count, n_group=n_group), best_experts(saliency, count=n_group, n_group=n_group),
        strict=True,
    ):  # fmt: skip
        assert set(fewer.tolist()) <= set(more.tolist())


@pytest.mark.parametrize(
    ("num_experts", "n_group", "keep", "expected"),
    [
        (10, 1, 1.0, 10),
        (10, 1, 0.75, 8),  # 7.5 rounds up
        (10, 1, 0.74, 7),
        (10, 1, 0.7, 7),  # not 7.000000000000001
        (10, 1, 0.001, 1),  # never none
        (128, 1, 0.5, 64),
        (16, 4, 0.5, 8),
        (16, 4, 0.6, 8),  # 2.4 a group
        (16, 4, 0.63, 12),  # 2.52 a group
        (16, 4, 0.01, 4),
    ],
)
def test_a_share_is_rounded_to_a_number_that_fits_the_groups(num_experts, n_group, keep, expected):
    assert num_to_keep(facts(num_experts=num_experts, n_group=n_group), keep=keep) == expected


@given(keep=st.floats(0, 1, exclude_min=True), size=st.integers(1, 64), n_group=st.integers(1, 8))
def test_a_share_never_asks_for_more_than_there_is(keep, size, n_group):
    count = num_to_keep(facts(num_experts=size * n_group, n_group=n_group), keep=keep)
    assert count % n_group == 0 and n_group <= count <= size * n_group
    assert count == n_group or abs(count / n_group - keep * size) <= 0.5 + 1e-9


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, 8.0, float("nan"), float("inf")])
def test_a_share_out_of_range(keep):
    with pytest.raises(PlanError) as error:
        num_to_keep(facts(), keep=keep)
    assert str(error.value) == (
        f"--keep {keep}: expected a share above 0 and at most 1. For a number, use --keep-experts."
    )
