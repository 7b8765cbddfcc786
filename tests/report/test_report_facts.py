from __future__ import annotations

import pytest

from moeprune.report.facts import ReportError, read_facts


def refusal(facts) -> str:
    with pytest.raises(ReportError) as caught:
        read_facts(facts)
    return str(caught.value)


def test_another_format_is_refused_with_the_way_out(make_facts):
    assert refusal(make_facts() | {"format": 2}) == (
        "The facts have format 2, expected 1. "
        "Write the report with the moeprune version that measured it, or measure again."
    )


def test_missing_field_is_named(make_facts):
    facts = make_facts()
    del facts["variants"][1]["bytes"]
    assert refusal(facts) == "The facts cannot be read: variants.1.bytes: Field required."


def test_nan_is_refused(make_facts):
    facts = make_facts()
    facts["variants"][2]["results"]["offline_arithmetic"]["value"] = float("nan")
    assert refusal(facts) == (
        "The facts cannot be read: variants.2.results.offline_arithmetic.value: Input should be a finite number."
    )


def test_misspelt_baseline_gets_a_suggestion(make_facts):
    facts = make_facts(cuts={"topk-6": (1.0, 6, None, 0.004)}) | {"baseline": "orignal"}
    assert refusal(facts) == (
        "The facts cannot be read: facts: baseline 'orignal' is not a variant. "
        "Did you mean 'original'? Known: original, topk-6."
    )


def test_two_variants_of_one_name_are_refused(make_facts):
    facts = make_facts(cuts={"topk-6": (1.0, 6, None, 0.004)})
    facts["variants"][1]["name"] = "original"
    assert refusal(facts) == ("The facts cannot be read: facts: variant names must differ, got original, original.")


def test_router_matrices_must_agree(make_facts):
    facts = make_facts()
    facts["router"]["load_by_domain"]["sql"].pop()
    assert refusal(facts) == (
        "The facts cannot be read: router: load_by_domain['sql'] needs 5 rows of 64, got 4 rows of 64."
    )


def test_shares_after_pruning_belong_to_kept_experts(make_facts):
    facts = make_facts()
    facts["router"]["after"]["reap-75"][0].pop()
    assert refusal(facts) == (
        "The facts cannot be read: router: after['reap-75'] needs one share for each expert of kept['reap-75']."
    )


def test_many_problems_are_counted_not_listed(make_facts):
    facts = make_facts()
    for variant in facts["variants"][:5]:
        del variant["bytes"]
    assert refusal(facts) == (
        "The facts cannot be read: variants.0.bytes: Field required; variants.1.bytes: Field required; "
        "variants.2.bytes: Field required; and 2 more."
    )
