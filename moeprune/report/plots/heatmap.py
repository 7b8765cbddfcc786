"""Heat maps of layers or domains by experts: one small image, sharp at every size."""

from __future__ import annotations

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from moeprune.report.facts import RouterFacts
from moeprune.report.palette import LIGHT
from moeprune.report.plots.arrays import by_load, layer_numbers
from moeprune.report.plots.figure import add_axes, points

WIDTH = 1080
LEFT, RIGHT = 60, 84
_MANY_ROWS = 24
_MOST_DOTS = 600


def row_height(rows: int) -> float:
    """Pixels for one layer: generous for few, thin for many."""
    return max(6.0, min(26.0, 380.0 / rows))


def sequential() -> Colormap:
    """From dark to bright, equal steps to the eye, distinct for colour-blind readers; lacks the darkest tenth."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 1.0, 256))
    return ListedColormap(colours, name="load")


def diverging() -> Colormap:
    """Blue below zero, orange above, transparent at zero, so that it sits on light and dark paper."""
    low, high = to_rgb("#2b7fc0"), to_rgb("#d9681d")
    nodes = [(0.0, (*low, 1.0)), (0.5, (*low, 0.0)), (0.5, (*high, 0.0)), (1.0, (*high, 1.0))]
    return LinearSegmentedColormap.from_list("more or less", nodes, N=256)


def draw(axes: Axes, values: Float[np.ndarray, "rows experts"], *, colours: Colormap, norm: Normalize) -> AxesImage:
    """One cell a value; NaN stays blank."""
    axes.set_facecolor(LIGHT["blank"] if np.isnan(values).any() else "none")
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    rows = values.shape[0]
    if rows <= _MANY_ROWS:
        for row in range(1, rows):
            axes.axhline(row - 0.5, color=LIGHT["paper"], linewidth=points(2))
    return image


def draw_layers(
    figure: Figure,
    values: Float[np.ndarray, "layers experts"],
    *,
    router: RouterFacts,
    top: float,
    height: float,
    norm: Normalize,
) -> tuple[Axes, AxesImage]:
    """A panel of layers by experts, those of a layer in the order of their load before pruning.

    Args:
        figure: Where to draw it.
        values: Any value of each expert; NaN stays blank.
        router: Loads and names of the layers.
        top: Pixels above it.
        height: Its own pixels.
        norm: The scale of its colours.
    """
    bottom = figure.get_size_inches()[1] * 96.0 - top - height
    axes = add_axes(figure, left=LEFT, right=RIGHT + 36, top=top, bottom=bottom)
    ordered = np.take_along_axis(values, by_load(np.array(router.load)), axis=1)
    image = draw(axes, ordered, colours=sequential(), norm=norm)
    label_rows(axes, layer_numbers(router.layers), what="layer")
    axes.set_xlabel("experts of a layer, ordered by their load before pruning")
    return axes, image


def mark_cells(axes: Axes, marked: Bool[np.ndarray, "rows experts"]) -> None:
    """A white dot with a dark rim in each marked cell; one small image of specks where they would be too many."""
    rows, experts = np.nonzero(marked)
    if len(rows) <= _MOST_DOTS:
        style = {"markersize": points(6.5), "markeredgewidth": points(1), "markeredgecolor": "#000000"}
        axes.plot(experts, rows, "o", markerfacecolor="#ffffff", clip_on=False, **style)
        return
    size = 3
    overlay = np.zeros((marked.shape[0] * size, marked.shape[1] * size, 4), dtype=np.uint8)
    overlay[rows * size + 1, experts * size + 1] = 255
    box = (-0.5, marked.shape[1] - 0.5, marked.shape[0] - 0.5, -0.5)
    axes.imshow(overlay, aspect="auto", interpolation="none", extent=box)


def times(value: float) -> str:
    """A multiple as a tick label: a fraction below one."""
    number = f"{value:g}" if value >= 1 else f"1/{1 / value:.0f}"
    return f"{number}\N{THIN SPACE}\N{MULTIPLICATION SIGN}"


def label_rows(axes: Axes, labels: list[str], *, what: str) -> None:
    """All rows named where there is room, otherwise every fifth or tenth."""
    step = 1 if len(labels) <= _MANY_ROWS else 10 if len(labels) > 50 else 5
    axes.set_yticks(range(0, len(labels), step), labels[::step])
    axes.set_ylabel(what)


def colour_bar(
    figure: Figure,
    image: AxesImage,
    *,
    top: float,
    height: float,
    ticks: dict[float, str],
    label: str,
    marks: dict[float, str] | None = None,
) -> None:
    """A colour bar at the right edge, at least 90 pixels tall; ``marks`` are lines across it with a name."""
    total = figure.get_size_inches()[1] * 96.0
    tall = max(height, 90.0)
    bar = add_axes(figure, left=WIDTH - RIGHT + 30, right=RIGHT - 46, top=top, bottom=max(0.0, total - top - tall))
    colours = figure.colorbar(image, cax=bar)
    colours.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    colours.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.minorticks_off()
    bar.tick_params(length=0, pad=points(3))
    bar.set_title(label, fontsize=points(11), color=LIGHT["muted"], loc="left", pad=points(11))
    for value, name in (marks or {}).items():
        bar.axhline(value, color="#ffffff", linewidth=points(3))
        bar.axhline(value, color="#000000", linewidth=points(1.2))
        bar.annotate(
            name,
            (0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-points(3), 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=points(10.5),
        )
