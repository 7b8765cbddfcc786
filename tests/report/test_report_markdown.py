from __future__ import annotations

import re

from moeprune.report import summary_table
from moeprune.report.facts import read_facts
from moeprune.report.markdown import escape, fence, markdown


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row for row in cells}


def test_summary_numbers_are_those_of_the_facts(make_facts):
    facts = make_facts()
    rows = rows_of(summary_table(facts))
    heads = rows["variant"]
    for variant in facts["variants"]:
        row = dict(zip(heads, rows[variant["name"]], strict=True))
        assert int(row["experts"]) == variant["num_experts"]
        assert int(row["top-k"]) == variant["top_k"]
        assert row["size"].startswith(f"{variant['bytes'] / 2**20:.2f} MiB")
        assert row["offline choice (%)"].startswith(f"{100 * variant['groups']['offline_choice']['value']:.1f} ± ")
        assert row["offline bpb (bits per byte)"].startswith(f"{variant['groups']['offline_bpb']['value']:.3f} ± ")
        if "paired" in variant:
            change = variant["paired"]["offline_bpb"]
            mark = "*" if abs(change["difference"]) > 2 * change["stderr"] else ""
            assert f"({change['difference']:+.3f} ± {change['stderr']:.3f}{mark})" in row["offline bpb (bits per byte)"]


def test_domain_table_numbers_are_those_of_the_facts(make_facts):
    facts = make_facts()
    section = markdown(read_facts(facts)).split("## Bits per byte by domain")[1].split("##")[0]
    rows = rows_of(section)
    for variant in facts["variants"]:
        for head, cell in list(zip(rows["variant"], rows[variant["name"]], strict=True))[1:-1]:
            value = variant["results"][f"offline_bpb_{head}"]["value"]
            assert cell.split(" ")[0] == f"{value:.3f}"


def test_columns_line_up_as_plain_text(make_facts):
    lines = [line for line in summary_table(make_facts()).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8
    assert len({len(line) for line in lines}) == 1


def test_many_tasks_turn_the_table(make_facts):
    domains = tuple(f"subject{i}" for i in range(30))
    section = markdown(read_facts(make_facts(domains=domains))).split("## Choice accuracy by domain")[1].split("##")[0]
    rows = rows_of(section)
    assert rows["domain"][1] == "original"
    assert "subject29" in rows


def test_hostile_names_stay_text():
    assert escape("a|b <script>`x`\n*y*") == r"a\|b &lt;script&gt;\`x\` \*y\*"


def test_fence_outgrows_backticks_inside():
    assert fence("a ``` b\n", "yaml") == "````yaml\na ``` b\n````"


def test_whole_document_names_sections_once(make_facts):
    heads = [line for line in markdown(read_facts(make_facts())).splitlines() if line.startswith("## ")]
    assert heads == [
        "## Cliffs",
        "## Best at each size",
        "## All variants",
        "## Choice accuracy by domain (%)",
        "## Bits per byte by domain",
        "## Model and calibration",
        "## Verification",
        "## Warnings",
        "## Environment",
        "## Time taken",
        "## Recipe",
        "## To reproduce",
    ]
