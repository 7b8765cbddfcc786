"""Load by layer and expert, before and after pruning, on one colour scale."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from moeprune.format import percent
from moeprune.report.facts import Facts, RouterFacts
from moeprune.report.plots.arrays import kept_mask, load_after, shown_plans
from moeprune.report.plots.figure import Plot, drawing, new_figure, to_svg
from moeprune.report.plots.heatmap import WIDTH, colour_bar, draw_layers, row_height, times

_LOWEST = 1 / 16
_TOP, _GAP = 26.0, 30.0
_TICKS = {value: times(value) for value in (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)}


def load_plots(facts: Facts) -> list[Plot]:
    """Before, and after for the plan that was exported (or the strongest cut)."""
    assert facts.router is not None
    plan = next((name for name in shown_plans(facts, most=99) if name in facts.router.after), None)
    return [_load_plot(facts.router, plan)]


def _load_plot(router: RouterFacts, plan: str | None) -> Plot:
    load = np.array(router.load)
    experts = load.shape[1]
    panels = {"before": load * experts}
    if plan is not None:
        panels[f"after {plan}"] = load_after(router, plan) * experts
    most = max(2.0, *(float(np.nanmax(values)) for values in panels.values()))
    with drawing("load"):
        height = row_height(len(load)) * len(load)
        figure = new_figure(WIDTH, round(len(panels) * (height + _GAP) + 44))
        image = _draw_panels(figure, router, panels, height, LogNorm(_LOWEST, most))
        marks = {1.0: f"even, {experts}"}
        if plan is not None:
            marks[experts / kept_count(router, plan)] = f"even, {kept_count(router, plan):g}"
        ticks = {value: text for value, text in _TICKS.items() if value <= most}
        span = height * len(panels) + _GAP * (len(panels) - 1)
        colour_bar(figure, image, top=_TOP, height=span, ticks=ticks, label="load", marks=marks)
        svg = to_svg(figure, "load", f"Router load by layer and expert, {' and '.join(panels)}")
    return Plot("load", _title(load, router, plan), _caption(experts, router, plan), svg, WIDTH)


def _draw_panels(
    figure: Figure, router: RouterFacts, panels: dict[str, np.ndarray], height: float, norm: LogNorm
) -> AxesImage:
    images = []
    for i, (title, values) in enumerate(panels.items()):
        top = _TOP + i * (height + _GAP)
        axes, image = draw_layers(figure, np.maximum(values, _LOWEST), router=router, top=top, height=height, norm=norm)
        images.append(image)
        axes.set_title(title)
        axes.set_xticks(_expert_ticks(values.shape[1]))
        if i < len(panels) - 1:
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
    return images[0]


def kept_count(router: RouterFacts, plan: str) -> float:
    """Mean number of experts that a plan keeps in a layer."""
    return float(np.mean([len(row) for row in router.kept[plan]]))


def _title(load: Float[np.ndarray, "layers experts"], router: RouterFacts, plan: str | None) -> str:
    quarter = max(1, load.shape[1] // 4)
    busy = float(np.sort(load, axis=1)[:, -quarter:].sum(axis=1).mean())
    text = f"The busiest {quarter} of {load.shape[1]} experts serve {percent(busy)} of the routed tokens"
    if plan is None:
        return text
    served = float((load * kept_mask(router, plan)).sum(axis=1).mean())
    return f"{text}; the experts that {plan} keeps served {percent(served)}"


def _caption(experts: int, router: RouterFacts, plan: str | None) -> str:
    text = f"Colour: share of routed tokens as a multiple of an even share (1/{experts} of them), logarithmic."
    if plan is None:
        return text
    kept = kept_count(router, plan)
    return f"{text} Blank: dropped. The second mark is an even share among the {kept:g} experts that remain."


def _expert_ticks(experts: int) -> list[int]:
    step = next(step for step in (4, 8, 16, 32, 64, 128) if experts / step <= 10)
    return list(range(0, experts, step))
