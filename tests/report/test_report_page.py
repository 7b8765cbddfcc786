from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moeprune.errors import MissingDependencyError
from moeprune.report import ReportError, write_report
from moeprune.report.page import minus
from moeprune.report.palette import DARK, LIGHT


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        if not self._silent:
            self.text += data


@pytest.fixture(scope="module")
def full(make_facts, tmp_path_factory) -> Path:
    return write_report(make_facts(), out_dir=tmp_path_factory.mktemp("full"))


def test_three_files_and_nothing_else(full, make_facts):
    assert full.name == "report.html"
    assert sorted(path.name for path in full.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((full.parent / "report.json").read_text()) == make_facts()


def test_page_loads_nothing_from_elsewhere(full):
    text = full.read_text()
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_ids_are_unique_and_references_resolve(full):
    text = full.read_text()
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {first or second for first, second in used} <= set(ids)


def test_colours_of_plots_exist_in_both_themes(full):
    used = set(re.findall(r"var\(--([a-z]+)\)", full.read_text()))
    assert set(LIGHT) == set(DARK)
    assert used - {"sans", "mono", "n", "t", "w", "worse", "better"} <= set(LIGHT)


def test_speed_is_labelled_as_no_serving_engine(full):
    assert "plain transformers, not a serving engine" in Page(full.read_text()).text


def test_the_same_facts_give_the_same_bytes(full, make_facts, tmp_path):
    again = write_report(make_facts(), out_dir=tmp_path)
    assert again.read_bytes() == full.read_bytes()
    assert (tmp_path / "report.md").read_bytes() == (full.parent / "report.md").read_bytes()


def test_hostile_names_are_escaped(make_facts, tmp_path):
    bad = '<img src=x onerror="alert(1)">|$x$'
    facts = make_facts(cuts={bad: (0.75, 8, "reap", 0.012)}, domains=("python", "<b>sql</b>", "law"), layers=2)
    facts["model"]["name"] = facts["title"] = facts["command"] = facts["recipe_yaml"] = bad
    page = Page(write_report(facts, out_dir=tmp_path).read_text())
    assert [tag for tag, attributes in page.tags if "onerror" in attributes or tag == "img"] == []
    assert bad in page.text
    assert "<img" not in re.sub(r"```.*?```", "", (tmp_path / "report.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    "missing", ["router", "calibration", "verify", "recipe_yaml", "command", "environment", "seconds"]
)
def test_a_missing_section_is_simply_not_there(make_facts, tmp_path, missing):
    facts = make_facts(layers=2, cuts={"reap-75": (0.75, 8, "reap", 0.012)})
    del facts[missing]
    heading = {
        "router": "Routers and experts",
        "calibration": "Calibration",
        "verify": "Verification",
        "recipe_yaml": "Recipe",
        "command": "moeprune run",
        "environment": "Environment",
        "seconds": "Time taken",
    }[missing]
    text = Page(write_report(facts, out_dir=tmp_path).read_text()).text
    assert heading not in text


def test_parts_of_the_router_section_may_be_missing(make_facts, tmp_path):
    facts = make_facts(layers=2)
    for name in ("saliency", "load_by_domain", "entropy", "kept", "after"):
        del facts["router"][name]
    text = Page(write_report(facts, out_dir=tmp_path).read_text()).text
    assert "The busiest 16 of 64 experts serve" in text
    assert "saliency" not in text


def test_only_top_k_variants(make_facts, tmp_path):
    facts = make_facts(cuts={"topk-6": (1.0, 6, None, 0.004), "topk-4": (1.0, 4, None, 0.03)}, cliff=None)
    text = write_report(facts, out_dir=tmp_path).read_text()
    assert "of the\N{NO-BREAK SPACE}stored size" not in text
    assert 'aria-label="bits per byte against active parameters"' in text
    assert 'aria-label="bits per byte against stored size"' not in text


def test_tasks_without_groups(make_facts, tmp_path):
    names = {"offline_choice_python": "arc_challenge", "offline_choice_sql": "hellaswag", "offline_arithmetic": "gsm8k"}
    facts = make_facts(cliff=None)
    for variant in facts["variants"]:
        variant["groups"] = {}
        for key in ("results", "paired"):
            variant[key] = {names[k]: value for k, value in variant.get(key, {}).items() if k in names}
    text = Page(write_report(facts, out_dir=tmp_path).read_text()).text
    assert "Multiple choice accuracy by task (%)" in text
    assert "GSM8K exact match" in text


def test_one_domain_without_throughput(make_facts, tmp_path):
    facts = make_facts(domains=("python",), cliff=None, layers=1)
    for variant in facts["variants"]:
        del variant["throughput"]
    text = Page(write_report(facts, out_dir=tmp_path).read_text()).text
    assert "by domain" not in text
    assert "tokens/s" not in text


def test_a_large_model_stays_below_the_size_limit(make_facts, tmp_path):
    page = write_report(make_facts(layers=58, experts=256), out_dir=tmp_path)
    assert page.stat().st_size < 1_500_000


def test_without_matplotlib_nothing_is_written(make_facts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError) as caught:
        write_report(make_facts(), out_dir=tmp_path / "out")
    assert str(caught.value) == (
        "The report's plots need matplotlib, which is not installed. Run: pip install 'moeprune[report]'"
    )
    assert not (tmp_path / "out").exists()


def test_bad_facts_write_nothing(tmp_path):
    with pytest.raises(ReportError):
        write_report({"format": 1}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_minus_signs_leave_names_alone():
    assert minus("reap-75-topk-6 falls by -0.4 (-3 %)") == (
        "reap-75-topk-6 falls by \N{MINUS SIGN}0.4 (\N{MINUS SIGN}3\N{NO-BREAK SPACE}%)"
    )
