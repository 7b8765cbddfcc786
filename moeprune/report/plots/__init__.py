"""The plots of a report as inline SVG; needs matplotlib."""

from __future__ import annotations

from moeprune.report.facts import Facts
from moeprune.report.plots.domains import domain_plots
from moeprune.report.plots.figure import Plot
from moeprune.report.plots.router import router_plots
from moeprune.report.plots.tradeoff import tradeoff_plots


def plots(facts: Facts) -> dict[str, list[Plot]]:
    """All plots the facts allow, by section of the page."""
    return {"tradeoff": tradeoff_plots(facts), "domains": domain_plots(facts), "router": router_plots(facts)}


__all__ = ["Plot", "plots"]
