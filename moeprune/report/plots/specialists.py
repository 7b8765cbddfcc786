"""Which experts serve which domain, in the layer where this is most pronounced."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from moeprune.report.facts import Facts
from moeprune.report.palette import LIGHT
from moeprune.report.plots.arrays import (
    domain_names,
    domain_shares,
    kept_mask,
    layer_numbers,
    shown_plans,
    specialisation,
)
from moeprune.report.plots.figure import Plot, add_axes, drawing, new_figure, points, to_svg
from moeprune.report.plots.heatmap import LEFT, RIGHT, WIDTH, colour_bar, diverging, draw, label_rows, times

_ROW = 24.0
_REACH = 2.0


def specialist_plot(facts: Facts) -> Plot:
    """Domains by experts of the most specialised layer, experts ordered by the domain that uses them most."""
    assert facts.router is not None
    router, names = facts.router, domain_names(facts.router)
    layer = int(np.argmax(specialisation(router)))
    ratio = _log_ratio(domain_shares(router)[:, layer])
    order = _by_favourite(ratio)
    plan = next(iter(shown_plans(facts, most=1)), None)
    height = _ROW * len(names)
    left = max(LEFT, 26 + 7 * max(map(len, names)))
    with drawing("specialists"):
        figure = new_figure(WIDTH, round(max(height, 100) + 78))
        bottom = figure.get_size_inches()[1] * 96.0 - 26.0 - height
        axes = add_axes(figure, left=left, right=RIGHT + 36, top=26.0, bottom=bottom)
        image = draw(axes, ratio[:, order], colours=diverging(), norm=Normalize(-_REACH, _REACH))
        label_rows(axes, names, what="")
        axes.set_xticks([])
        if plan is not None:
            _mark_dropped(axes, ~kept_mask(router, plan)[layer][order])
        number = layer_numbers(router.layers)[layer]
        axes.set_xlabel(f"experts of layer {number}, ordered by the domain that uses them most", labelpad=points(12))
        ticks = {-2.0: times(1 / 4), -1.0: times(1 / 2), 0.0: times(1), 1.0: times(2), 2.0: times(4)}
        colour_bar(figure, image, top=26.0, height=height, ticks=ticks, label="use")
        svg = to_svg(figure, "specialists", f"Use of the experts of layer {number} by domain")
    caption = "Colour: a domain's use of an expert as a multiple of the mean over domains."
    if plan is not None:
        caption += f" Triangles below: dropped by {plan}."
    bits, most = float(specialisation(router)[layer]), math.log2(len(names))
    title = (
        f"Experts specialise most in layer {number}: "
        f"one choice of expert tells {bits:.2f} of {most:.1f} bits about the domain"
    )
    return Plot("specialists", title, caption, svg, WIDTH)


def _mark_dropped(axes: Axes, dropped: Bool[np.ndarray, "experts"]) -> None:
    """A triangle below each dropped expert."""
    places = np.flatnonzero(dropped)
    axes.plot(
        places,
        np.full(len(places), -0.018),
        "^",
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        color=LIGHT["ink"],
        markersize=points(7 if len(dropped) <= 128 else 4),
        markeredgewidth=0,
    )


def _log_ratio(shares: Float[np.ndarray, "domains experts"]) -> Float[np.ndarray, "domains experts"]:
    mean = shares.mean(axis=0)
    floor = np.maximum(shares, np.maximum(mean, 1e-12) * 2.0**-_REACH)
    return np.log2(floor / np.maximum(mean, 1e-12))


def _by_favourite(ratio: Float[np.ndarray, "domains experts"]) -> Int[np.ndarray, "experts"]:
    """Experts by favourite domain, within it the most devoted first."""
    return np.lexsort((-ratio.max(axis=0), ratio.argmax(axis=0)))
