"""docs/engines.md is the rules."""

from pathlib import Path

from moeprune.deploy.rule import RULES
from moeprune.deploy.table import markdown

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "python -m moeprune.deploy.table > docs/engines.md"


def test_every_rule_has_one_row_of_five_cells():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(RULES))
    assert {row.count(" | ") for row in rows} == {4}
