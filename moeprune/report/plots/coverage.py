"""Tokens by layer and expert of a statistics file, as a picture: `moeprune stats show --plot`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moeprune.calibrate.coverage import STARVED_TOKENS, is_starved
from moeprune.calibrate.stats import Stats
from moeprune.files import replacing
from moeprune.report.palette import LIGHT
from moeprune.report.plots.figure import drawing
from moeprune.report.plots.heatmap import LEFT, RIGHT, WIDTH, colour_bar, draw, label_rows, row_height, sequential

_TOP, _GAP, _BOTTOM = 30.0, 34.0, 44.0
_DOTS_PER_INCH = 144
_PIXELS = 96.0


def plot_coverage(stats: Stats, path: Path) -> None:
    """Write a PNG with one panel a domain: tokens of every expert, those of a layer ordered by their load over all.

    Experts that no token of a domain reached stay blank.

    Args:
        stats: The statistics.
        path: The file to write.
    """
    counts = stats.experts["count"]
    order = np.argsort(-counts.sum(axis=0), axis=1, kind="stable")
    panels = {
        domain: np.take_along_axis(values, order, axis=1)
        for domain, values, tokens in zip(stats.domains, counts, stats.tokens, strict=True)
        if tokens
    }
    height = row_height(len(stats.model.layers))
    panel = height * len(stats.model.layers)
    with drawing("coverage"):
        total = _TOP + len(panels) * panel + (len(panels) - 1) * _GAP + _BOTTOM
        figure = Figure(figsize=(WIDTH / _PIXELS, total / _PIXELS), facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        _draw(figure, stats, panels, panel=panel, total=total)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def _draw(
    figure: Figure,
    stats: Stats,
    panels: dict[str, Float64[np.ndarray, "layers experts"]],
    *,
    panel: float,
    total: float,
) -> None:
    most = max(10.0, *(float(values.max()) for values in panels.values()))
    norm, image = LogNorm(1, most), None
    labels = [name.rpartition("layers.")[2] for name in stats.model.layers]
    for index, (domain, values) in enumerate(panels.items()):
        top = _TOP + index * (panel + _GAP)
        box = (LEFT / WIDTH, 1 - (top + panel) / total, 1 - (LEFT + RIGHT + 36) / WIDTH, panel / total)
        axes = figure.add_axes(box)
        image = draw(axes, np.where(values > 0, values, np.nan), colours=sequential(), norm=norm)
        label_rows(axes, labels, what="layer")
        starved = int(is_starved(values).sum())
        axes.set_title(
            f"{domain}: {starved} experts with fewer than {STARVED_TOKENS} tokens, {_never(values)} with none"
        )
        last = index == len(panels) - 1
        axes.tick_params(labelbottom=last)
        axes.set_xlabel("experts of a layer, ordered by their tokens over all domains" if last else "")
    assert image is not None
    span = len(panels) * panel + (len(panels) - 1) * _GAP
    ticks = {10.0**power: f"{10**power:,}" for power in range(int(np.log10(most)) + 1)}
    marks = {float(STARVED_TOKENS): f"{STARVED_TOKENS}"} if most > STARVED_TOKENS else None
    colour_bar(figure, image, top=_TOP, height=span, ticks=ticks, label="tokens", marks=marks)


def _never(values: Float64[np.ndarray, "layers experts"]) -> int:
    return int((values == 0).sum())
