"""Saliency by layer and expert, with the dropped experts marked."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm

from moeprune.format import percent
from moeprune.report.facts import Facts, Saliency
from moeprune.report.plots.arrays import by_load, kept_mask, shown_plans
from moeprune.report.plots.figure import Plot, drawing, new_figure, to_svg
from moeprune.report.plots.heatmap import WIDTH, colour_bar, draw_layers, mark_cells, row_height, times

_TOP = 26.0
_TICKS = {value: times(value) for value in (1 / 10, 1 / 3, 1.0, 3.0, 10.0)}


def saliency_plot(facts: Facts, saliency: Saliency) -> Plot:
    """Experts in the order of the load map, so that busy but unimportant ones stand out."""
    assert facts.router is not None
    router = facts.router
    values = np.array(saliency.values)
    mean = values.mean(axis=1, keepdims=True)
    relative = values / np.where(mean == 0, 1.0, mean)
    plan = _plan_of(facts, saliency.score)
    norm = LogNorm(0.1, max(2.0, float(relative.max())))
    height = row_height(len(values)) * len(values)
    with drawing("saliency"):
        figure = new_figure(WIDTH, round(max(height, 90) + 74))
        axes, image = draw_layers(figure, np.maximum(relative, 0.1), router=router, top=_TOP, height=height, norm=norm)
        if plan is not None:
            order = by_load(np.array(router.load))
            mark_cells(axes, np.take_along_axis(~kept_mask(router, plan), order, 1))
        ticks = {value: text for value, text in _TICKS.items() if value <= norm.vmax}  # pyright: ignore[reportOperatorIssue]
        colour_bar(figure, image, top=_TOP, height=height, ticks=ticks, label="saliency")
        svg = to_svg(figure, "saliency", f"Saliency ({saliency.score}) by layer and expert")
    caption = f"Colour: {saliency.score} saliency as a multiple of its layer's mean, logarithmic."
    if plan is not None:
        caption += f" White dots: dropped by {plan}."
    return Plot("saliency", _title(facts, saliency, plan), caption, svg, WIDTH)


def _plan_of(facts: Facts, score: str) -> str | None:
    plans = shown_plans(facts, most=99)
    methods = {variant.name: variant.score for variant in facts.variants}
    return next((name for name in plans if methods[name] == score), None)


def _title(facts: Facts, saliency: Saliency, plan: str | None) -> str:
    if plan is None:
        return f"Saliency by {saliency.score}"
    assert facts.router is not None
    dropped = ~kept_mask(facts.router, plan)
    values, load = np.array(saliency.values), np.array(facts.router.load)
    lost = float((values * dropped).sum() / values.sum()) if values.sum() else 0.0
    used = float((load * dropped).sum(axis=1).mean())
    share = percent(float(dropped.mean()))
    return f"{plan} drops {share} of the experts: {percent(lost)} of the saliency, {percent(used)} of the load"
