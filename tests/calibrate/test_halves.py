"""Even and odd rows of the text are kept apart, whatever batches and processes they came in."""

from __future__ import annotations

import numpy as np
import pytest

from moeprune.calibrate.rows import Rows
from moeprune.calibrate.stats import Stats, merge_stats
from moeprune.errors import StatsError
from tests.calibrate.reference import assert_close, random_rows
from tests.calibrate.reference_more import observe_all
from tests.fake_stats import fake_stats
from tests.models import build


def rows_at(rows: Rows, numbers: list[int]) -> Rows:
    return rows.select(numbers)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_half_is_a_run_over_its_rows(family):
    model, rows = build(family), random_rows("text", rows=5, padding=4)
    stats = observe_all(model, rows, batch_size=2)
    for parity, numbers in ((0, [0, 2, 4]), (1, [1, 3])):
        alone = observe_all(model, rows_at(rows, numbers), batch_size=1)
        half = stats.half(parity)
        np.testing.assert_array_equal(half.tokens, alone.tokens)
        assert half.experts.keys() == alone.experts.keys()
        for name in half.experts:
            np.testing.assert_allclose(half.experts[name], alone.experts[name], rtol=1e-5, err_msg=name)


def test_halves_add_up_to_the_whole_to_the_last_bit():
    stats = observe_all(build("qwen3_moe"), random_rows("a", rows=7), random_rows("b", rows=4, padding=3), batch_size=3)
    np.testing.assert_array_equal(stats.halves["tokens"].sum(axis=0), stats.tokens)
    for name, array in stats.experts.items():
        even, odd = stats.halves[name]
        np.testing.assert_array_equal(np.maximum(even, odd) if name == "max_abs" else even + odd, array, err_msg=name)


def test_two_processes_with_rows_of_their_own_have_the_halves_of_one():
    model, rows = build("mixtral"), random_rows("text", rows=6, padding=4)
    one = observe_all(model, rows, batch_size=2)
    shares = [observe_all(model, rows, batch_size=2, order=order) for order in ([0, 1, 4], [5, 2, 3])]
    merged = merge_stats(shares)
    assert_close(merged, one, rtol=1e-5)
    np.testing.assert_array_equal(merged.halves["tokens"], one.halves["tokens"])
    np.testing.assert_array_equal(merged.halves["count"], one.halves["count"])
    np.testing.assert_array_equal(merged.halves["gate_sum"].sum(axis=0), merged.experts["gate_sum"])
    merged.check("test")


def test_halves_survive_the_file(tmp_path):
    stats = observe_all(build("mixtral"), random_rows("text"), statistics="merge")
    stats.save(tmp_path / "stats")
    loaded = Stats.load(tmp_path / "stats")
    assert loaded.statistics == "merge" and loaded.format == 2
    mine, others = dict(loaded.arrays()), dict(stats.arrays())
    assert mine.keys() == others.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], others[name], err_msg=name)


def test_halves_that_do_not_add_up_are_refused(tmp_path):
    stats = observe_all(build("mixtral"), random_rows("text"))
    stats.halves["gate_sum"][1, 0, 0, 2] += 0.5
    stats.save(tmp_path / "stats")
    with pytest.raises(StatsError, match="the halves of gate_sum do not add up to the whole"):
        Stats.load(tmp_path / "stats")


def test_without_row_numbers_nothing_is_said_of_halves():
    stats = fake_stats()
    assert stats.halves == {}
    with pytest.raises(StatsError, match="these statistics of tiny do not tell even from odd rows"):
        stats.half(0)


def test_merging_with_statistics_that_have_no_halves_leaves_them_out():
    with_halves = Stats.zeros(fake_stats().model, domains=["code"], halves=True)
    with_halves.tokens[0] = with_halves.halves["tokens"][0, 0] = 4
    assert merge_stats([with_halves, fake_stats()]).halves == {}
    assert merge_stats([with_halves, with_halves]).halves["tokens"].tolist() == [[8], [0]]
