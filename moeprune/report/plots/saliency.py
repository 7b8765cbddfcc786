"""Saliency by layer and expert, with the dropped experts marked."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm

from moeprune.report.facts import Facts, Saliency
from moeprune.report.plots.arrays import by_load, kept_mask, layer_numbers, shown_plans
from moeprune.report.plots.figure import Plot, add_axes, drawing, new_figure, to_svg
from moeprune.report.plots.heatmap import (
    LEFT,
    RIGHT,
    WIDTH,
    colour_bar,
    draw,
    label_rows,
    mark_cells,
    row_height,
    sequential,
    times,
)
from moeprune.report.quantities import write_percent

_TICKS = {value: times(value) for value in (1 / 10, 1 / 3, 1.0, 3.0, 10.0)}


def saliency_plot(facts: Facts, saliency: Saliency) -> Plot:
    """Experts in the order of the load map, so that busy but unimportant ones stand out."""
    assert facts.router is not None
    router = facts.router
    values, order = np.array(saliency.values), by_load(np.array(router.load))
    mean = values.mean(axis=1, keepdims=True)
    relative = values / np.where(mean == 0, 1.0, mean)
    plan = _plan_of(facts, saliency.score)
    norm = LogNorm(0.1, max(2.0, float(relative.max())))
    height = row_height(len(values)) * len(values)
    with drawing("saliency"):
        figure = new_figure(WIDTH, round(max(height, 90) + 74))
        bottom = figure.get_size_inches()[1] * 96.0 - 26.0 - height
        axes = add_axes(figure, left=LEFT, right=RIGHT + 36, top=26.0, bottom=bottom)
        image = draw(axes, np.maximum(np.take_along_axis(relative, order, 1), 0.1), colours=sequential(), norm=norm)
        if plan is not None:
            mark_cells(axes, np.take_along_axis(~kept_mask(router, plan), order, 1))
        label_rows(axes, layer_numbers(router.layers), what="layer")
        axes.set_xlabel("experts of a layer, ordered by their load before pruning")
        ticks = {value: text for value, text in _TICKS.items() if value <= norm.vmax}  # pyright: ignore[reportOperatorIssue]
        colour_bar(figure, image, top=26.0, height=height, ticks=ticks, label="saliency")
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
    share = write_percent(float(dropped.mean()))
    return (
        f"{plan} drops {share} of the experts: {write_percent(lost)} of the saliency, {write_percent(used)} of the load"
    )
