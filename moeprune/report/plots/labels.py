"""Names beside points, pushed apart where they would overlap."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from moeprune.report.palette import LIGHT
from moeprune.report.plots.figure import pixels_of, points

_HEIGHT = 14.0
_SAME_COLUMN = 45.0
_NEAR = 13.0


def label_points(axes: Axes, names: Sequence[str], places: Sequence[tuple[float, float]]) -> None:
    """Write each name to the right of its point; a thin line leads to it where it had to move.

    Args:
        axes: Axes whose limits are already set.
        names: One a point.
        places: The points in data coordinates.
    """
    pixels, (low, high) = pixels_of(axes, places)
    columns: list[list[int]] = []
    for i in sorted(range(len(names)), key=lambda i: pixels[i][0]):
        if columns and pixels[i][0] - pixels[columns[-1][-1]][0] < _SAME_COLUMN:
            columns[-1].append(i)
        else:
            columns.append([i])
    for column in columns:
        right = max(pixels[i][0] for i in column) + _NEAR
        heights = spread([pixels[i][1] for i in column], gap=_HEIGHT, low=low + 6, high=high - 6)
        for i, height in zip(column, heights, strict=True):
            _write(axes, names[i], places[i], (right - pixels[i][0], height - pixels[i][1]))


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart, near the wanted ones and within the bounds where there is room.

    Neighbours that overlap become a block around their common mean, and blocks that then overlap merge.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[int]] = []
    starts: list[float] = []
    for i in order:
        blocks.append([i])
        starts.append(min(max(wanted[i], low), high))
        while len(blocks) > 1 and starts[-2] + gap * len(blocks[-2]) > starts[-1]:
            last, _ = blocks.pop(), starts.pop()
            blocks[-1] += last
            size = len(blocks[-1])
            middle = sum(wanted[k] for k in blocks[-1]) / size
            starts[-1] = max(low, min(middle - gap * (size - 1) / 2, high - gap * (size - 1)))
    placed = [0.0] * len(wanted)
    for block, start in zip(blocks, starts, strict=True):
        for step, i in enumerate(block):
            placed[i] = start + gap * step
    return placed


def _write(axes: Axes, name: str, place: tuple[float, float], shift: tuple[float, float]) -> None:
    moved = abs(shift[1]) > 3 or shift[0] > _NEAR + 7
    line = {"arrowstyle": "-", "color": LIGHT["faint"], "linewidth": points(0.8), "shrinkA": 0, "shrinkB": points(5)}
    axes.annotate(
        name,
        place,
        xytext=(points(shift[0]), points(shift[1])),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=points(11.5),
        color=LIGHT["ink"],
        arrowprops=line if moved else None,
        zorder=5,
        annotation_clip=False,
    )
