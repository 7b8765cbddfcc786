"""Mixes of domains: budgets add up, mistakes are named, and every mix that ships can be read."""

import re

import pytest

from moeprune.data_mix import expand_data, load_mix, mixes
from moeprune.data_spec import DataSpec, parse_data_spec
from moeprune.errors import DataError


def expand(*texts: str, tokens: int = 1000) -> tuple[DataSpec, ...]:
    return expand_data([parse_data_spec(text) for text in texts], tokens=tokens)


@pytest.mark.parametrize("name", mixes())
def test_every_shipped_mix_begins_with_its_command_and_says_where_it_is_from(name):
    text = mixes()[name].read_text()
    head = text[: text.index("about:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"moeprune calibrate MODEL --data {name} --length" in head
    assert re.search(r"# Source: .*(arXiv|https://|ream\.yaml)", head)
    mix = load_mix(mixes()[name])
    assert mix.about
    names = [spec.name for spec in mix.domains]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", mixes())
def test_every_shipped_mix_is_used_by_name_and_by_file(name):
    domains = expand(name)
    assert domains == expand(str(mixes()[name]))
    assert all(spec.share is None and (spec.tokens or spec.documents) for spec in domains)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ream", {"math": 471_859, "code": 1_101_005}),  # 0.3 and 0.7 of 3,072 x 512
        ("ream-three", dict.fromkeys(("c4", "math", "code"), 3072 * 512)),
        ("reap-code", {"code": 1024 * 2048}),
        ("naee-c4", {"c4": 128 * 2048}),
    ],
)
def test_budgets_are_those_of_the_publications(name, expected):
    assert {spec.name: spec.tokens for spec in expand(name)} == expected


def test_numbers_of_documents_are_those_of_the_publications():
    assert [spec.documents for spec in expand("reap")] == [4096] * 6
    assert [(spec.name, spec.documents) for spec in expand("easy-ep")] == [("math", 25), ("code", 25), ("science", 25)]
    assert sum(spec.tokens or 0 for spec in expand("naee-math")) == pytest.approx(128 * 2048, abs=7)


def test_a_mix_of_another_size_keeps_its_shares():
    assert {spec.name: spec.tokens for spec in expand("ream?tokens=1000")} == {"math": 300, "code": 700}
    assert {spec.documents for spec in expand("reap?documents=10")} == {10}
    assert {spec.documents for spec in expand("easy-ep?documents=100")} == {25}, "no more than there are"


def test_shares_given_one_by_one_split_the_budgets_of_their_domains():
    first, second, third = expand("a.jsonl?share=3", "b.jsonl", "c.jsonl?share=1", tokens=1000)
    assert (first.tokens, second.tokens, third.tokens) == (1500, 1000, 500)


def test_domains_stay_in_the_order_given():
    names = [spec.name for spec in expand("x.jsonl", "ream", "y.jsonl", "demo/python")]
    assert names == ["x", "math", "code", "y", "python"]


def test_documents_are_a_budget_of_their_own():
    (spec,) = expand("a.jsonl?documents=5")
    assert spec.tokens is None and spec.documents == 5


def test_a_file_called_as_a_mix_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ream").write_text("")
    assert [spec.source for spec in expand("ream")] == ["ream"]


def refused(*texts: str) -> str:
    with pytest.raises(DataError) as error:
        expand(*texts)
    return str(error.value)


def test_what_belongs_to_a_domain_is_not_given_to_a_mix():
    assert refused("ream?split=test") == (
        "ream: a mix takes tokens, documents and drop; 'split' belongs to one of its domains."
    )
    assert "'domain' belongs" in refused("mine=ream")
    assert refused("reap?tokens=5") == "reap: its domains have no shares of a budget. Give documents instead of tokens."


def test_the_column_option_is_not_for_mixes():
    specs = [parse_data_spec("ream", column="body")]
    assert [spec.column for spec in expand_data(specs, tokens=1)] == ["solution", "content"]


MISTAKES = {
    "domains: [{source: a}": "not YAML",
    "domains: []": "domains: ",
    "- a": "mix: Input should be",
    "domains: [{source: a, colum: text}]": "domains.0.colum: unknown key. Did you mean 'column'?",
    "tokns: 5\ndomains: [{source: a}]": "tokns: unknown key. Did you mean 'tokens'?",
    "domains: [{source: a, column: b, text: c}]": "domains.0: give one of text and column",
    "tokens: 5\ndomains: [{source: a}]": "Give both, or neither.",
    "domains: [{source: a, share: 1}]": "Give both, or neither.",
    "domains: [{source: ream}]": "a mix of mixes (ream)",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_mix_is_named(tmp_path, text):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    assert MISTAKES[text] in refused(str(path))
    assert refused(str(path)).startswith(str(path))


def test_a_mix_that_is_not_there():
    assert refused("recipes/data/raep.yaml").startswith("recipes/data/raep.yaml: no such file. `moeprune ls data`")


def test_what_all_domains_of_a_mix_are_to_leave_out():
    found = expand_data([parse_data_spec("reap?drop=tools&documents=3")], tokens=1)
    assert {spec.drop for spec in found} == {("tools",)}
