"""Numbers of each layer: the sorted load, how even it is, how much it depends on the domain."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moeprune.report.facts import Facts, RouterFacts
from moeprune.report.palette import LIGHT
from moeprune.report.plots.arrays import layer_numbers, specialisation
from moeprune.report.plots.figure import Plot, add_axes, bare, drawing, new_figure, points, to_svg
from moeprune.report.plots.heatmap import times

_WIDTH, _HEIGHT = 350, 250
_FEW = 3
_TICKS = (1 / 100, 1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0, 30.0)


def layer_plots(facts: Facts) -> list[Plot]:
    """Sorted load always; evenness and specialisation where there are three layers or more."""
    assert facts.router is not None
    router = facts.router
    made = [_sorted_load(router)]
    if len(router.entropy) >= _FEW and len(router.entropy) == len(router.layers):
        low = int(np.argmin(router.entropy))
        title = f"Layer {layer_numbers(router.layers)[low]} uses its experts least evenly"
        caption = "Entropy of the load; 1 is an even load."
        made.append(_by_layer(router, "entropy", np.array(router.entropy), (title, caption, "load entropy (0 to 1)")))
    if len(router.load_by_domain) > 1 and len(router.layers) >= _FEW:
        bits = specialisation(router)
        title = f"Layer {layer_numbers(router.layers)[int(bits.argmax())]} tells domains apart best"
        caption = "Mutual information of expert and domain."
        made.append(_by_layer(router, "domain-bits", bits, (title, caption, "specialisation (bits)")))
    return made


def _sorted_load(router: RouterFacts) -> Plot:
    load = -np.sort(-np.array(router.load), axis=1) * len(router.load[0])
    experts = load.shape[1]
    rank = np.arange(1, experts + 1)
    with drawing("sorted-load"):
        figure, axes = _small()
        if len(load) <= 12:
            for row in load:
                axes.plot(rank, np.maximum(row, 1e-3), color=LIGHT["blue"], linewidth=points(1.2), alpha=0.55)
        else:
            low, middle, high = (np.quantile(load, q, axis=0) for q in (0.1, 0.5, 0.9))
            axes.fill_between(rank, np.maximum(low, 1e-3), high, color=LIGHT["blue"], alpha=0.25, linewidth=0)
            axes.plot(rank, np.maximum(middle, 1e-3), color=LIGHT["blue"], linewidth=points(1.8))
        axes.axhline(1.0, color=LIGHT["muted"], linewidth=points(1.2), dashes=(4, 3))
        axes.set_yscale("log")
        axes.set_ylim(max(0.01, float(load.min()) * 0.8), float(load.max()) * 1.25)
        low, high = axes.get_ylim()
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_yticks(ticks, [times(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(1, experts)
        axes.set_xlabel("experts, the most used first")
        axes.set_ylabel("load (even = 1)")
        svg = to_svg(figure, "sorted-load", "Load of the experts of each layer, sorted")
    idle = float((load < 0.25).mean())
    title = f"{idle:.0%} of the experts get less than a quarter of an even share".replace("%", " %")
    what = "One line a layer." if len(load) <= 12 else "Median over layers; the band holds 80 % of them."
    return Plot("sorted-load", title, what, svg, _WIDTH, wide=False)


def _by_layer(router: RouterFacts, name: str, values: np.ndarray, words: tuple[str, str, str]) -> Plot:
    title, caption, label = words
    with drawing(name):
        figure, axes = _small()
        place = np.arange(len(values))
        style = {"markersize": points(7 if len(values) < 30 else 4), "color": LIGHT["blue"]}
        axes.plot(place, values, "o-", linewidth=points(1.4), markeredgewidth=0, **style)
        pad = 0.15 * float(np.ptp(values)) or 0.01
        axes.set_ylim(float(values.min()) - pad, float(values.max()) + pad)
        step = max(1, round(len(values) / 6))
        axes.set_xticks(place[::step], layer_numbers(router.layers)[::step])
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        svg = to_svg(figure, name, f"{label} by layer")
    return Plot(name, title, caption, svg, _WIDTH, wide=False)


def _small() -> tuple[Figure, Axes]:
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = add_axes(figure, left=62, right=10, top=10, bottom=44)
    bare(axes, grid="y")
    axes.spines["bottom"].set_visible(True)
    return figure, axes
