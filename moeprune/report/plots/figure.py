"""A matplotlib figure with the report's look, and its SVG made fit for a page that holds several.

Sizes are CSS pixels at which the text is meant to be read. Text stays text: the page's own font sets it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moeprune.report.palette import LIGHT

_PIXELS = 96.0
_POINT = 72.0 / _PIXELS
_NAMES = {value: name for name, value in LIGHT.items()}


@dataclass(frozen=True)
class Plot:
    """A finished plot: the finding as its title, how to read it as its caption. ``width`` is in CSS pixels."""

    name: str
    title: str
    caption: str
    svg: str
    width: int
    wide: bool = True


def points(pixels: float) -> float:
    """A length in CSS pixels as points, the unit of fonts and lines."""
    return pixels * _POINT


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Within this block matplotlib draws in the report's style, and the same figure gives the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(name))  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def new_figure(width: int, height: int) -> Figure:
    """A transparent figure without axes."""
    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    return figure


def add_axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes at margins given in CSS pixels from the figure's edges."""
    width, height = figure.get_size_inches() * _PIXELS
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure.add_axes(box)


def pixels_of(
    axes: Axes, places: Sequence[tuple[float, float]]
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Data coordinates as CSS pixels from the figure's lower left, and the axes' own lower and upper edge."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes belong to a figure"
    scale = _PIXELS / figure.dpi
    found = [(float(x) * scale, float(y) * scale) for x, y in axes.transData.transform(list(places))]
    low, high = axes.bbox.intervaly
    return found, (float(low) * scale, float(high) * scale)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element whose ids carry ``name`` and whose colours follow the page's theme.

    Args:
        figure: Drawn inside :func:`drawing`.
        name: Unique on the page; letters, digits and hyphens.
        label: What a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    head = re.search(r'viewBox="[^"]+"', text)
    assert head is not None, "matplotlib gives its SVG a viewBox"
    body = text[text.index(">") + 1 :]
    body = re.sub(r'\sstyle="[^"]*"', lambda match: _themed(match.group()), body).replace("xlink:href", "href")
    body = re.sub(r"\n\s*", "\n", _own_ids(body, name))
    return f'<svg {head.group()} role="img" aria-label="{html.escape(label)}">{body}'.rstrip()


def bare(axes: Axes, *, grid: str | None = None) -> None:
    """Only what is read remains of the frame: no box, an optional grid in one direction."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    if grid is not None:
        axes.grid(axis=grid, color=LIGHT["rule"], linewidth=points(1))  # pyright: ignore[reportArgumentType]
        axes.set_axisbelow(True)


def _themed(style: str) -> str:
    style = re.sub(r"#[0-9a-f]{6}", lambda match: _variable(match.group()), style)
    style = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", style)
    return re.sub(r"(font: [^;\"]*?\d+px) [^;\"]*", r"\1 var(--sans)", style)


def _variable(colour: str) -> str:
    return f"var(--{_NAMES[colour]})" if colour in _NAMES else colour


def _own_ids(body: str, name: str) -> str:
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{name}-{m.group(1)}"' if m.group(1) in used else "", body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)


def _style(name: str) -> dict[str, Any]:
    return {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": points(12),
        "axes.labelsize": points(12),
        "axes.titlesize": points(12.5),
        "axes.titlelocation": "left",
        "axes.titlecolor": LIGHT["ink"],
        "axes.edgecolor": LIGHT["faint"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.facecolor": "none",
        "axes.linewidth": points(1),
        "axes.unicode_minus": True,
        "xtick.color": LIGHT["faint"],
        "ytick.color": LIGHT["faint"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "xtick.labelsize": points(11.5),
        "ytick.labelsize": points(11.5),
        "text.color": LIGHT["ink"],
        "legend.frameon": False,
        "image.composite_image": False,
    }
