from __future__ import annotations

import math

import pytest

from moeprune.report.comparison import best_at_each_size, difference, families, scores
from moeprune.report.facts import read_facts
from moeprune.report.findings import cards, cliff_summary, cliffs, join_words, resolution, verdict
from moeprune.report.metrics import Kind, score_label, write_change, write_value

ONE_CUT = {"reap-75": (0.75, 8, "reap", 0.012)}


def variant_of(facts, name):
    return next(variant for variant in facts["variants"] if variant["name"] == name)


def set_group(facts, name, group, difference, stderr):
    variant_of(facts, name)["paired"][group] = {"difference": difference, "stderr": stderr, "n": 100}


def test_kinds_of_result_stay_apart(make_facts):
    found = scores(read_facts(make_facts()))
    assert [(score.name, score.kind) for score in found] == [
        ("offline_choice", Kind.CHOICE),
        ("offline_arithmetic", Kind.GENERATION),
        ("offline_bpb", Kind.LOSS),
    ]
    assert [score.label for score in found] == ["choice accuracy", "arithmetic exact match", "bits per byte"]


def test_domains_are_the_names_after_the_prefix_of_the_group(make_facts):
    found = families(read_facts(make_facts(domains=("python", "sql"))))
    assert [(family.group, family.domains) for family in found] == [
        ("offline_choice", ("python", "sql")),
        ("offline_bpb", ("python", "sql")),
    ]


def test_headline_names_the_smallest_variant_without_a_measurable_drop(make_facts):
    facts = make_facts(cuts=ONE_CUT)
    set_group(facts, "reap-75", "offline_choice", -0.004, 0.006)
    set_group(facts, "reap-75", "offline_arithmetic", 0.01, 0.02)
    set_group(facts, "reap-75", "offline_bpb", 0.012, 0.001)
    chosen, sentence = verdict(read_facts(facts))
    original, slim = facts["variants"]
    assert chosen is not None
    assert chosen.name == "reap-75"
    assert sentence == (
        "The smallest variant without a measurable drop in any task score is reap-75: 48 of 64 experts, top-8; "
        f"{100 * slim['bytes'] / original['bytes']:.0f} % of the bytes, 100 % of the active parameters; "
        "choice accuracy -0.4 ± 0.6 points, arithmetic exact match +1.0 ± 2.0 points, bits per byte +0.012 ± 0.001."
    )


def test_headline_recommends_nothing_where_all_variants_drop(make_facts):
    facts = make_facts(cuts=ONE_CUT)
    set_group(facts, "reap-75", "offline_choice", -0.02, 0.006)
    chosen, sentence = verdict(read_facts(facts))
    assert chosen is None
    assert sentence.startswith("No variant is without a measurable drop in any task score. The mildest is reap-75: ")


def test_a_drop_of_unknown_error_is_not_called_harmless(make_facts):
    facts = make_facts(cuts=ONE_CUT)
    set_group(facts, "reap-75", "offline_choice", -0.2, None)
    set_group(facts, "reap-75", "offline_arithmetic", 0.0, 0.02)
    assert verdict(read_facts(facts))[0] is None


def test_a_page_of_the_original_alone_says_so(make_facts):
    assert verdict(read_facts(make_facts(cuts={}))) == (
        None,
        "moeprune demo: no slimmed variant has been compared with the original yet.",
    )


def test_best_at_each_size_is_judged_by_loss(make_facts):
    chosen = best_at_each_size(read_facts(make_facts()))
    assert [(best.name, [rival.name for rival in rivals]) for best, rivals in chosen] == [
        ("topk-6", []),
        ("topk-4", []),
        ("reap-75", ["random-75"]),
        ("reap-75-topk-6", []),
        ("reap-50", ["random-50"]),
    ]


def test_unpaired_differences_add_both_errors(make_facts):
    facts = make_facts(cuts=ONE_CUT)
    del variant_of(facts, "reap-75")["paired"]
    read = read_facts(facts)
    found = difference(read, read.slimmed[0], "offline_arithmetic")
    original, slim = (variant["results"]["offline_arithmetic"] for variant in facts["variants"])
    assert found is not None
    assert not found.paired
    assert found.value == slim["value"] - original["value"]
    assert found.stderr == pytest.approx(math.sqrt(slim["stderr"] ** 2 + original["stderr"] ** 2))


def flat(facts, name, *, rise, error, steep=None):
    """All losses of a variant rise by the share ``rise``, one of them by another share."""
    originals = facts["variants"][0]["results"]
    for task, pair in variant_of(facts, name)["paired"].items():
        if task.startswith("offline_bpb_"):
            share = steep[1] if steep is not None and task.endswith(steep[0]) else rise
            pair |= {"difference": share * originals[task]["value"], "stderr": error}


def test_cliff_is_named_with_its_size(make_facts):
    facts = make_facts(cuts=ONE_CUT, cliff=None, domains=("python", "sql", "law", "math"))
    flat(facts, "reap-75", rise=0.02, error=0.001, steep=("sql", 0.1))
    read = read_facts(facts)
    assert [cliff.sentence for cliff in cliffs(read)] == [
        "reap-75 falls off a cliff on sql: bits per byte +0.094 (+10 %), "
        "while the other domains change by +2.0 % on average, 5.0 times as much."
    ]
    assert cliff_summary(read) is None
    assert verdict(read)[1].endswith(" Mind its cliff on sql.")


@pytest.mark.parametrize(
    ("rise", "error", "steep", "why"),
    [
        (0.02, 0.001, None, "all domains rise alike"),
        (0.02, 0.001, ("sql", 0.035), "less than twice the others"),
        (0.001, 0.0001, ("sql", 0.02), "a trifle"),
        (0.02, 0.05, ("sql", 0.1), "within the noise"),
    ],
)
def test_no_cliff_where_there_is_none(make_facts, rise, error, steep, why):
    facts = make_facts(cuts=ONE_CUT, cliff=None, domains=("python", "sql", "law", "math"))
    flat(facts, "reap-75", rise=rise, error=error, steep=steep)
    read = read_facts(facts)
    assert cliffs(read) == [], why
    assert cliff_summary(read) == "No domain falls much further than the others in choice accuracy and bits per byte."


def test_two_domains_are_too_few_for_a_cliff(make_facts):
    facts = make_facts(cuts=ONE_CUT, cliff=None, domains=("python", "sql"))
    flat(facts, "reap-75", rise=0.02, error=0.001, steep=("sql", 0.5))
    assert cliffs(read_facts(facts)) == []
    assert cliff_summary(read_facts(facts)) is None


def test_accuracy_has_cliffs_too(make_facts):
    facts = make_facts(cuts=ONE_CUT, cliff=None, domains=("python", "sql", "law"))
    paired = variant_of(facts, "reap-75")["paired"]
    for domain, change in {"python": -0.01, "law": 0.01, "sql": -0.2}.items():
        paired[f"offline_choice_{domain}"] = {"difference": change, "stderr": 0.01, "n": 300}
    assert [cliff.sentence for cliff in cliffs(read_facts(facts))] == [
        "reap-75 falls off a cliff on sql: accuracy -20.0 points, "
        "while the other domains change by +0.0 points on average."
    ]


def test_resolution_says_what_cannot_be_seen(make_facts):
    facts = make_facts(cuts=ONE_CUT)
    set_group(facts, "reap-75", "offline_choice", -0.004, 0.006)
    set_group(facts, "reap-75", "offline_arithmetic", 0.01, 0.02)
    set_group(facts, "reap-75", "offline_bpb", 0.012, 0.001)
    assert resolution(read_facts(facts)) == (
        "Changes smaller than about 1.2 points in choice accuracy, 4.0 points in arithmetic exact match "
        "and 0.002 in bits per byte cannot be told from chance here."
    )


def test_cards_mark_the_recommended_variant(make_facts):
    read = read_facts(make_facts())
    chosen, _ = verdict(read)
    assert [card.variant.name for card in cards(read) if card.recommended] == ([chosen.name] if chosen else [])


def test_numbers_as_text():
    assert write_value(0.7123, "acc") == "71.2"
    assert write_value(1.4242, "bits_per_byte") == "1.424"
    assert write_change(-0.012, "exact_match,strict-match") == "-1.2"
    assert write_change(-0.0001, "acc") == "+0.0"
    assert score_label("gsm8k", "exact_match,flexible-extract") == "GSM8K exact match"
    assert join_words(["a", "b", "c"]) == "a, b and c"
