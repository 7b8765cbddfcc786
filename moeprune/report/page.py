"""The page: facts, tables and plots set in one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from moeprune.format import count, duration, percent
from moeprune.report.comparison import families, scores
from moeprune.report.facts import Facts
from moeprune.report.findings import cards, cliff_summary, cliffs, resolution, verdict
from moeprune.report.metrics import Kind
from moeprune.report.palette import DARK, LIGHT, css_variables
from moeprune.report.plots.figure import Plot
from moeprune.report.tables import (
    Table,
    calibration_table,
    domain_tables,
    environment_table,
    main_table,
    seconds_table,
)

_SHOWN_CLIFFS = 6


@dataclass(frozen=True)
class Span:
    """A heading above several columns."""

    text: str
    columns: int


def page(facts: Facts, plots: dict[str, list[Plot]]) -> str:
    """The whole report as HTML.

    Args:
        facts: What to say.
        plots: From :func:`moeprune.report.plots.plots`; any section may be empty.
    """
    template = _environment(facts).get_template("report.html.j2")
    recommended, headline = verdict(facts)
    steep, made = cliffs(facts), cards(facts)
    return template.render(
        facts=facts,
        verdict=headline,
        recommended=recommended,
        resolution=resolution(facts),
        cards=made,
        card_columns=_columns(len(made)),
        tasks=any(score.kind != Kind.LOSS for score in scores(facts)),
        cliffs=steep[:_SHOWN_CLIFFS],
        more_cliffs=steep[_SHOWN_CLIFFS:],
        no_cliffs=cliff_summary(facts),
        main=main_table(facts),
        domain_tables=domain_tables(facts),
        calibration=calibration_table(facts),
        environment=environment_table(facts),
        seconds=seconds_table(facts),
        warnings=[(variant.name, text) for variant in facts.variants for text in variant.warnings],
        member="domain" if any(family.group for family in families(facts)) else "task",
        plots=plots,
        svg={plot.name: Markup(plot.svg) for section in plots.values() for plot in section},
        light=Markup(css_variables(LIGHT)),
        dark=Markup(css_variables(DARK)),
    )


def _environment(facts: Facts) -> Environment:
    environment = Environment(
        loader=PackageLoader("moeprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(minus=minus, spans=spans, percent=percent, count=count, time=duration)
    environment.filters["sentence"] = sentence_filter(facts)
    return environment


def _columns(cards: int) -> int:
    """Cards in a row, so that rows are about equally full."""
    rows = -(-cards // 5)
    return max(3, -(-cards // rows)) if cards else 3


def minus(text: str) -> Markup:
    """Real minus signs, and no line break before a per cent sign; names such as ``reap-75`` keep their hyphen."""
    safe = re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", str(escape(text)))
    return Markup(re.sub(r"(?<=\d) (?=%|±)", "\N{NO-BREAK SPACE}", safe).replace("± ", "±\N{NO-BREAK SPACE}"))


def sentence_filter(facts: Facts) -> Callable[[str], Markup]:
    """The filter for computed sentences: as :func:`minus`, with the names of the variants in bold."""
    names = sorted((str(escape(variant.name)) for variant in facts.slimmed), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])") if names else None

    def sentence(text: str) -> Markup:
        safe = minus(text)
        return Markup(pattern.sub(lambda found: f"<b>{found.group()}</b>", str(safe))) if pattern else safe

    return sentence


def spans(table: Table) -> list[Span]:
    """The upper row of a table's head; empty when no column has a heading above it."""
    if not any(column.over for column in table.columns):
        return []
    row: list[Span] = []
    for column in table.columns:
        if row and row[-1].text == column.over:
            row[-1] = Span(column.over, row[-1].columns + 1)
        else:
            row.append(Span(column.over, 1))
    return row
