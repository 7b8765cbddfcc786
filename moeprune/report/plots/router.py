"""What the routers do: load before and after, saliency, domains, and the three numbers of each layer."""

from __future__ import annotations

from moeprune.report.facts import Facts
from moeprune.report.plots.figure import Plot
from moeprune.report.plots.layers import layer_plots
from moeprune.report.plots.loadmap import load_plots
from moeprune.report.plots.saliency import saliency_plot
from moeprune.report.plots.specialists import specialist_plot


def router_plots(facts: Facts) -> list[Plot]:
    """All that the router section allows; nothing without one."""
    if facts.router is None:
        return []
    made = load_plots(facts)
    if facts.router.saliency is not None:
        made.append(saliency_plot(facts, facts.router.saliency))
    if len(facts.router.load_by_domain) > 1:
        made.append(specialist_plot(facts))
    return made + layer_plots(facts)
