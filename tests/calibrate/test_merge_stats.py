"""Statistics are sums: two files say what one run over both texts says."""

import numpy as np
import pytest

from moeprune.calibrate.calibrate import record
from moeprune.calibrate.data import Rows
from moeprune.calibrate.stats import merge_stats
from moeprune.errors import StatsError
from tests.calibrate.reference import assert_close, observe, random_rows
from tests.fake_stats import facts, fake_stats
from tests.models import build


def test_merging_two_files_equals_one_run_over_both_texts():
    model = build("deepseek_v3")
    rows = random_rows("text", rows=6, padding=4)
    first, second = (Rows("text", rows.ids[part], rows.mask[part]) for part in (slice(0, 4), slice(4, 6)))
    merged = merge_stats([observe(model, first), observe(model, second)])
    at_once = observe(model, rows)
    assert_close(merged, at_once, rtol=1e-12)
    np.testing.assert_array_equal(merged.experts["max_abs"], at_once.experts["max_abs"])


def test_domains_of_one_name_are_added_and_others_kept_apart():
    first = fake_stats(domains=("code", "math"), seed=1)
    second = fake_stats(domains=("prose", "code"), seed=2)
    merged = merge_stats([first, second])
    assert merged.domains == ("code", "math", "prose")
    assert merged.tokens.tolist() == [4000 + 8000, 8000, 4000]
    for name in first.experts.keys() - {"max_abs"}:
        np.testing.assert_array_equal(merged.experts[name][0], first.experts[name][0] + second.experts[name][1])
        np.testing.assert_array_equal(merged.experts[name][1], first.experts[name][1])
        np.testing.assert_array_equal(merged.experts[name][2], second.experts[name][0])
    a, b = first.experts["max_abs"][0], second.experts["max_abs"][1]
    np.testing.assert_array_equal(merged.experts["max_abs"][0], np.where(a > b, a, b))
    np.testing.assert_array_equal(merged.experts["max_abs"][1], first.experts["max_abs"][1])
    np.testing.assert_array_equal(
        merged.layers["gate_entropy_sum"][0], first.layers["gate_entropy_sum"][0] + second.layers["gate_entropy_sum"][1]
    )
    assert merged.runs == [*first.runs, *second.runs]


def test_merging_leaves_its_parts_alone():
    part, again = fake_stats(), fake_stats()
    merge_stats([part, part])
    assert_close(part, again, rtol=0)
    assert part.runs == again.runs


def test_merging_one_part_is_that_part():
    assert_close(merge_stats([fake_stats()]), fake_stats(), rtol=0)


def test_the_same_weights_under_another_name_are_merged():
    merged = merge_stats([fake_stats(facts(name="/a")), fake_stats(facts(name="/b"))])
    assert merged.model.name == "/a"
    assert merged.tokens.tolist() == [8000, 16000]


def test_statistics_of_another_model_are_refused():
    other = facts(name="big", fingerprint="cd" * 32)
    with pytest.raises(StatsError) as error:
        merge_stats([fake_stats(), fake_stats(), fake_stats(other)])
    assert str(error.value) == (
        "statistics of different models cannot be merged: tiny (abababababab) and big (cdcdcdcdcdcd)."
    )


def test_text_that_two_parts_saw_is_not_counted_twice():
    """A file merged with itself, or with one that it is already part of, as `stats merge *.safetensors` would do."""
    code, both = fake_stats(), fake_stats()
    code.runs = [{"text": {"code": "aa", "math": "bb"}}]
    both.runs = [{"text": {"web": "cc"}}, {"text": {"python": "aa"}}]
    with pytest.raises(StatsError) as error:
        merge_stats([code, both])
    assert str(error.value) == (
        "the text of 'python' in statistics 2 of 2 is that of 'code' in statistics 1: merged, it would count twice. "
        "Leave one of them out."
    )
    both.runs = [{"text": {"web": "cc", "web again": "cc"}}, {}]
    assert merge_stats([code, both]).runs == code.runs + both.runs, "text given twice to one run is its user's choice"


def test_a_run_records_its_text_whatever_its_domain_is_called():
    def recorded(rows):
        return record([rows], seed=0, dtype="float32", device="cpu")["text"]

    rows = random_rows("code", rows=6)
    (text,) = recorded(rows).values()
    assert recorded(Rows("again", rows.ids, rows.mask)) == {"again": text}
    assert recorded(random_rows("code", rows=6, seed=1)) != {"code": text}
    assert recorded(Rows("code", rows.ids, rows.mask, segments=rows.ids * 0)) != {"code": text}
