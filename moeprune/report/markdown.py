"""The report as Markdown, and the table that a run ends with. Columns are aligned as plain text too."""

from __future__ import annotations

import re

from moeprune.format import count, duration
from moeprune.report.comparison import scores
from moeprune.report.facts import Facts
from moeprune.report.findings import cards, cliff_summary, cliffs, cost_words, join_words, resolution, verdict
from moeprune.report.tables import (
    Cell,
    Column,
    Table,
    calibration_table,
    domain_tables,
    environment_table,
    main_table,
    score_title,
    seconds_table,
    speed_heading,
)

SUMMARY_NOTE = (
    "In brackets: the share of the original's size, or the difference from the original on the same items; "
    "± is one standard error, and * marks differences larger than two."
)


def markdown(facts: Facts) -> str:
    """The whole report without its plots, fit for a model card."""
    parts = [f"# {escape(facts.title)}: slimming {escape(facts.model.name)}", escape(verdict(facts)[1])]
    parts += [escape(text) for text in (resolution(facts), cliff_summary(facts)) if text]
    fallen = cliffs(facts)
    if fallen:
        parts += ["## Cliffs", "\n".join(f"- {escape(cliff.sentence)}" for cliff in fallen)]
    if facts.slimmed:
        parts += ["## Best at each size", _cards(facts)]
    parts += _section(main_table(facts))
    for table in domain_tables(facts):
        parts += _section(table)
    parts += _model(facts) + _checks(facts) + _warnings(facts)
    for table in (environment_table(facts), seconds_table(facts)):
        parts += _section(table) if table else []
    if facts.recipe_yaml:
        parts += ["## Recipe", fence(facts.recipe_yaml, "yaml")]
    if facts.command:
        parts += ["## To reproduce", fence(facts.command, "bash")]
    return "\n\n".join(parts) + "\n"


def summary(facts: Facts) -> str:
    """The short table: size, scores with differences, decoding speed."""
    full = main_table(facts)
    wanted = {"experts", "top-k", "active", "size", "decode"} | {score_title(score) for score in scores(facts)}
    kept = [0, *(i for i, column in enumerate(full.columns) if i and column.title in wanted)]
    columns = [full.columns[i] for i in kept]
    rows = [[row[i] for i in kept] for row in full.rows]
    speed = f" {speed_heading(facts)}." if any(column.title == "decode" for column in columns) else ""
    return f"{render(Table('', columns, rows))}\n\n{SUMMARY_NOTE}{speed}"


def render(table: Table) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    heads = [_head(column) for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    widths = [max(3, len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    lines = [_line(heads, widths, table.columns)]
    ends = [":" if column.numeric else "-" for column in table.columns]
    rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    lines.append(f"| {' | '.join(rule)} |")
    lines += [_line(row, widths, table.columns) for row in rows]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text that stays text in Markdown and in the HTML made from it."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!])", r"\\\1", text)


def fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _line(cells: list[str], widths: list[int], columns: list[Column]) -> str:
    padded = [
        cell.rjust(width) if column.numeric else cell.ljust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _head(column: Column) -> str:
    title = column.alone or column.title
    return escape(f"{title} ({column.unit})" if column.unit else title)


def _cell(cell: Cell) -> str:
    return escape(cell.text) + (f" ({cell.sub})" if cell.sub else "")


def _section(table: Table) -> list[str]:
    return [f"## {escape(table.title)}", render(table), *([escape(" ".join(table.notes))] if table.notes else [])]


def _cards(facts: Facts) -> str:
    lines = []
    for card in cards(facts):
        changes = join_words([f"{label} {change}" for label, change, _ in card.changes])
        cost = cost_words(facts, card.variant)
        choice = f" ({card.choice})" if card.choice else ""
        lines.append(f"- {escape(f'{card.size}: {card.variant.name}{choice}: {cost}; {changes}.')}")
    return "\n".join(lines)


def _model(facts: Facts) -> list[str]:
    model = facts.model
    words = [f"{model.num_experts} experts", f"top-{model.top_k}", model.router]
    described = f"{model.source or model.name} ({', '.join(word for word in words if word)})."
    parts = ["## Model and calibration", escape(described)]
    if facts.calibration is not None:
        took = f" in {duration(facts.calibration.seconds)}" if facts.calibration.seconds is not None else ""
        parts.append(f"Calibrated on {count(facts.calibration.tokens)} tokens{took}.")
    table = calibration_table(facts)
    return [*parts, *([render(table)] if table else [])]


def _checks(facts: Facts) -> list[str]:
    if facts.verify is None:
        return []
    lines = [
        f"- [{'x' if check.passed else ' '}] {escape(check.name)}{': ' + escape(check.detail) if check.detail else ''}"
        for check in facts.verify.checks
    ]
    state = "The exported checkpoint passed every check." if facts.verify.passed else "The exported checkpoint FAILED."
    return ["## Verification", state, *(["\n".join(lines)] if lines else [])]


def _warnings(facts: Facts) -> list[str]:
    lines = [f"- {escape(v.name)}: {escape(text)}" for v in facts.variants for text in v.warnings]
    return ["## Warnings", "\n".join(lines)] if lines else []
