from __future__ import annotations

import numpy as np
import pytest

from moeprune.report.facts import read_facts
from moeprune.report.plots import plots
from moeprune.report.plots.arrays import by_load, layer_numbers, load_after, shown_plans, specialisation
from moeprune.report.plots.labels import spread
from moeprune.report.plots.marks import Mark, marks_of
from moeprune.report.plots.tradeoff import Point, pareto


def test_labels_keep_their_distance_and_their_order():
    wanted = [10.0, 11.0, 12.0, 60.0]
    placed = spread(wanted, gap=14.0, low=0.0, high=100.0)
    assert np.all(np.diff(placed) >= 14.0 - 1e-9)
    assert placed[3] == 60.0
    assert min(placed) >= 0.0


def test_labels_that_fit_stay():
    assert spread([50.0, 10.0], gap=14.0, low=0.0, high=100.0) == [50.0, 10.0]


def point(name: str, x: float, y: float) -> Point:
    return Point(name, x, y, 0.0, Mark("reap", "o", "blue", False))


def test_pareto_keeps_what_no_smaller_one_beats():
    found = [point("a", 50, 60), point("b", 75, 64), point("c", 75, 61), point("d", 100, 63), point("e", 100, 70)]
    assert [p.name for p in pareto(found, higher_is_better=True)] == ["a", "b", "e"]
    assert [p.name for p in pareto(found, higher_is_better=False)] == ["a"]


def test_dropped_experts_are_blank_after(make_facts):
    read = read_facts(make_facts())
    assert read.router is not None
    after = load_after(read.router, "reap-50")
    for layer, kept in enumerate(read.router.kept["reap-50"]):
        assert np.flatnonzero(~np.isnan(after[layer])).tolist() == kept
    assert np.nansum(after, axis=1) == pytest.approx(np.ones(5))


def test_experts_are_ordered_by_load():
    assert by_load(np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])).tolist() == [[1, 2, 0], [0, 2, 1]]


def test_specialisation_is_mutual_information(make_facts):
    read = read_facts(make_facts(layers=3, experts=7, top_k=2, domains=("a", "b"), cuts={}))
    assert read.router is not None
    expected = []
    for layer in range(3):
        joint = np.array([read.router.load_by_domain[name][layer] for name in ("a", "b")]) / 2
        product = joint.sum(axis=0, keepdims=True) * joint.sum(axis=1, keepdims=True)
        expected.append(sum(p * np.log2(p / q) for p, q in zip(joint.ravel(), product.ravel(), strict=True)))
    assert specialisation(read.router) == pytest.approx(np.array(expected))


def test_exported_plan_is_shown_first(make_facts):
    assert shown_plans(read_facts(make_facts()), most=2) == ["reap-75-topk-6", "reap-50"]


def test_marks_tell_methods_and_top_k_apart(make_facts):
    marks = marks_of(read_facts(make_facts()))
    assert len({(mark.shape, mark.colour, mark.hollow) for mark in marks.values()}) == 5
    assert marks["reap-75"] == marks["reap-50"]
    assert marks["reap-75-topk-6"].hollow
    assert marks["random-75"].colour == "faint"


def test_layers_are_named_by_their_number():
    assert layer_numbers(["model.layers.3", "model.layers.17.mlp", "encoder"]) == ["3", "17", "2"]


def test_titles_state_findings(make_facts):
    facts = make_facts(cuts={"reap-75": (0.75, 8, "reap", 0.012)}, cliff=None, domains=("python", "sql", "law"))
    originals, slim = facts["variants"][0]["results"], facts["variants"][1]
    slim["paired"]["offline_choice"] |= {"stderr": 0.5}
    for domain, change in {"python": 0.01, "sql": 0.2, "law": 0.01}.items():
        task = f"offline_bpb_{domain}"
        slim["paired"][task] = {"difference": change, "stderr": 0.001, "n": 50}
        slim["results"][task]["value"] = originals[task]["value"] + change
    found = plots(read_facts(facts))
    titles = {plot.name: plot.title for plot in found["tradeoff"] + found["domains"]}
    share = 100 * slim["bytes"] / facts["variants"][0]["bytes"]
    assert titles["tradeoff-0"] == f"Choice accuracy holds down to {share:.0f} % of the stored size (reap-75)"
    assert titles["tradeoff-2"] == "Bits per byte rises measurably in every variant with a smaller stored size"
    assert titles["domains-0"] == "sql suffers most: +0.200 bits per byte"


def test_no_variants_no_tradeoff(make_facts):
    found = plots(read_facts(make_facts(cuts={})))
    assert found["tradeoff"] == found["domains"] == []
    assert found["router"][0].name == "load"
