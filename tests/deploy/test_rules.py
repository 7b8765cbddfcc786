"""Every rule on a model that breaks it and on one that does not, on every engine it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeprune.deploy.check import check
from moeprune.deploy.facts import facts_of_config
from moeprune.deploy.rule import ERROR, RULES, SERVERS
from moeprune.deploy.serving import Serving, servings
from tests.deploy.cases import CASES, Case, deepseek, qwen

PUBLISHED = sorted((Path(__file__).parents[1] / "anatomy" / "published").glob("*.json"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_that_breaks_the_rule(case: Case):
    facts, serving = case.build(held=False)
    report = check(facts, [serving])
    found = [finding for finding in report.findings if finding.rule == case.rule]
    assert len(found) == 1, report
    assert case.says in f"{found[0].what} {found[0].instead}"
    assert found[0].severity == RULES.get(case.rule).severity
    assert report.ok == all(finding.severity != ERROR for finding in report.findings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_that_keeps_the_rule(case: Case):
    facts, serving = case.build(held=True)
    report = check(facts, [serving])
    assert case.rule in report.passed, [str(finding) for finding in report.findings]


def test_every_rule_is_tried_on_every_engine_it_is_for_or_says_the_same_there():
    tried = {case.rule for case in CASES}
    assert tried == set(RULES)
    texts = {"same-count-in-every-layer", "multiple-of-eight", "name-of-transformers-4", "rope-theta", "groups-in-use"}
    missing = {(name, engine) for name in RULES for engine in RULES.get(name).engines} - {
        (case.rule, case.engine) for case in CASES
    }
    assert {name for name, _ in missing} <= texts


def test_every_rule_says_what_must_hold_and_where_that_was_read():
    for name in RULES:
        rule = RULES.get(name)
        assert rule.summary.endswith(".") and len(rule.summary) < 140, name
        assert rule.source.endswith("."), name


@pytest.mark.parametrize("facts", [qwen(), deepseek()], ids=["qwen3_moe", "deepseek_v3"])
def test_the_originals_have_no_fault_on_any_engine(facts):
    report = check(facts, servings())
    assert [str(finding) for finding in report.findings if finding.severity != "info"] == []


@pytest.mark.parametrize("file", PUBLISHED, ids=[file.stem for file in PUBLISHED])
def test_no_published_checkpoint_is_refused(file):
    """Engines serve these models: an error for one of them is an error of a rule."""
    raw = json.loads(file.read_text())
    report = check(facts_of_config(raw.get("config", raw)), servings())
    assert report.ok, [str(finding) for finding in report.findings]


def test_a_rule_whose_facts_are_missing_is_not_passed():
    report = check(qwen(config=None, expert_width=None, scoring=None), servings(["vllm"]))
    assert report.unchecked["names-agree"] == ("config.json",)
    assert report.unchecked["tp-cuts-experts"] == ("the experts' width",)
    assert report.unchecked["fused-top-k"] == ("how the router scores",)
    assert report.unchecked["tuned-file"] == ("--gpu", "the experts' width")
    assert not set(report.unchecked) & set(report.passed)


def test_the_same_finding_on_several_engines_is_told_once():
    report = check(qwen(num_experts=45), servings(SERVERS))
    assert [finding.engines for finding in report.findings if finding.rule == "multiple-of-eight"] == [SERVERS]


def test_errors_come_first():
    report = check(deepseek(num_experts=100), servings())
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert {"error", "warning", "info"} == set(severities)


def test_the_rules_of_one_engine_do_not_speak_for_another():
    report = check(qwen(num_experts=100), [Serving("vllm", ep=8)])
    assert "ep-even" not in {*report.passed, *report.unchecked, *(finding.rule for finding in report.findings)}
