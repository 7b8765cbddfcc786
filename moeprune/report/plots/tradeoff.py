"""Score against size: what each stored byte and each active parameter buys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from moeprune.report.comparison import SURE, Score, active_share, byte_share, difference, result_of, scores
from moeprune.report.facts import Facts, Variant
from moeprune.report.metrics import is_share, scale_of, write_value
from moeprune.report.palette import LIGHT
from moeprune.report.plots.figure import Plot, add_axes, bare, drawing, new_figure, points, to_svg
from moeprune.report.plots.labels import label_points
from moeprune.report.plots.marks import Mark, marks_of, style_of

WIDTH, HEIGHT = 520, 330
_MOST_PANELS = 12
_MOST_LABELS = 16
_FAR = 2.0
"""A control that would stretch the scale beyond this many times what the others need is drawn at the edge instead."""


@dataclass(frozen=True)
class Point:
    """A variant in the plane of size and score; ``error`` is two standard errors. All in the units drawn."""

    name: str
    x: float
    y: float
    error: float
    mark: Mark


def tradeoff_plots(facts: Facts) -> list[Plot]:
    """For each score one panel against stored size and one against active parameters, where these vary at all."""
    marks = marks_of(facts)
    sizes = {
        "stored size": {v.name: 100 * byte_share(facts, v) for v in facts.variants},
        "active parameters": {v.name: 100 * active_share(facts, v) for v in facts.variants},
    }
    varying = {label: share for label, share in sizes.items() if max(share.values()) - min(share.values()) > 1.0}
    made = []
    for score in scores(facts):
        for label, share in varying.items():
            found = _points(facts, score, share, marks)
            if len(found) > 1 and len(made) < _MOST_PANELS:
                made.append(_panel(facts, score, label, found, f"tradeoff-{len(made)}"))
    return [_legend(marks), *made] if made else []


def pareto(found: list[Point], *, higher_is_better: bool) -> list[Point]:
    """The points that no other beats in both size and score, by size."""
    sign = 1.0 if higher_is_better else -1.0
    front: list[Point] = []
    for point in sorted(found, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def _points(facts: Facts, score: Score, share: dict[str, float], marks: dict[str, Mark]) -> list[Point]:
    found = []
    for variant in facts.variants:
        result = result_of(variant, score.name)
        if result is not None:
            error = SURE * _error(facts, variant, score) * scale_of(score.metric)
            value = result.value * scale_of(score.metric)
            found.append(Point(variant.name, share[variant.name], value, error, marks[variant.name]))
    return found


def _error(facts: Facts, variant: Variant, score: Score) -> float:
    change = difference(facts, variant, score.name)
    return (change.stderr or 0.0) if change is not None else 0.0


def _panel(facts: Facts, score: Score, size: str, found: list[Point], name: str) -> Plot:
    original = next((point for point in found if point.name == facts.baseline), None)
    with drawing(name):
        figure = new_figure(WIDTH, HEIGHT)
        axes = add_axes(figure, left=58, right=8, top=8, bottom=42)
        bare(axes, grid="y")
        axes.spines["bottom"].set_visible(True)
        _set_x(axes, found)
        inside, outside = _within_reach(found)
        low, high = _set_y(axes, inside, outside)
        if original is not None:
            axes.axhline(original.y, color=LIGHT["muted"], linewidth=points(1.2), dashes=(4, 3), zorder=1)
        front = pareto(inside, higher_is_better=score.higher_is_better)
        axes.plot([p.x for p in front], [p.y for p in front], zorder=2, **_front_style())
        for point in inside:
            _draw_point(axes, point)
        edge = [replace(point, y=low if point.y < low else high, error=0.0) for point in outside]
        for point in edge:
            _draw_edge(axes, point, down=point.y == low)
        labelled = inside if len(inside) <= _MOST_LABELS else front
        values = {p.name: write_value(p.y / scale_of(score.metric), score.metric) for p in outside}
        names = [p.name for p in labelled] + [f"{p.name}: {values[p.name]}" for p in edge]
        label_points(axes, names, [(p.x, p.y) for p in [*labelled, *edge]])
        axes.set_xlabel(f"{size} (% of the original)")
        better = "higher is better" if score.higher_is_better else "lower is better"
        axes.set_ylabel(f"{score.label}{' (%)' if is_share(score.metric) else ''}, {better}")
        svg = to_svg(figure, name, f"{score.label} against {size}")
    return Plot(name, _title(score, size, original, found), "", svg, WIDTH, wide=False)


def _title(score: Score, size: str, original: Point | None, found: list[Point]) -> str:
    """How far down the score holds: two standard errors from the original, or better."""
    label = f"{score.label[:1].upper()}{score.label[1:]}"
    if original is None:
        return f"{label} against {size}"
    sign = 1.0 if score.higher_is_better else -1.0
    smaller = [point for point in found if point.x < original.x - 0.5]
    holding = [point for point in smaller if sign * (point.y - original.y) >= -point.error]
    if not holding:
        verb = "falls" if score.higher_is_better else "rises"
        less = "a smaller stored size" if size == "stored size" else f"fewer {size}"
        return f"{label} {verb} measurably in every variant with {less}"
    least = min(holding, key=lambda point: (point.x, -sign * point.y))
    return f"{label} holds down to {least.x:.0f} % of the {size} ({least.name})"


def _set_x(axes: Axes, found: list[Point]) -> None:
    low, high = min(p.x for p in found), max(p.x for p in found)
    axes.set_xlim(low - 0.06 * (high - low), high + 0.36 * (high - low))
    ticks = [tick for tick in axes.get_xticks() if low - 5 <= tick <= max(100.5, high)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _within_reach(found: list[Point]) -> tuple[list[Point], list[Point]]:
    """Controls pruned at random may lie so far off that nothing else could be told apart."""
    real = [point for point in found if point.mark.method.split(",")[0] != "random"]
    if len(real) < 2:
        return found, []
    low, high = min(p.y - p.error for p in real), max(p.y + p.error for p in real)
    reach = _FAR * (high - low)
    inside = [point for point in found if high - reach <= point.y <= low + reach or point in real]
    return inside, [point for point in found if point not in inside]


def _set_y(axes: Axes, inside: list[Point], outside: list[Point]) -> tuple[float, float]:
    """Limits with room for the marks of points beyond them; returns where those marks go."""
    low, high = min(p.y - p.error for p in inside), max(p.y + p.error for p in inside)
    span = (high - low) or 1.0
    below = 0.16 if any(p.y < low for p in outside) else 0.06
    above = 0.16 if any(p.y > high for p in outside) else 0.06
    axes.set_ylim(low - below * span, high + above * span)
    return low - 0.6 * below * span, high + 0.6 * above * span


def _draw_point(axes: Axes, point: Point) -> None:
    if point.error:
        ends = [point.y - point.error, point.y + point.error]
        axes.plot([point.x, point.x], ends, color=LIGHT[point.mark.colour], linewidth=points(1.5), zorder=3)
    axes.plot([point.x], [point.y], zorder=4, **style_of(point.mark))


def _draw_edge(axes: Axes, point: Point, *, down: bool) -> None:
    axes.plot([point.x], [point.y], zorder=4, **style_of(replace(point.mark, shape="v" if down else "^")))


def _front_style() -> dict[str, Any]:
    return {"color": LIGHT["faint"], "linewidth": points(1.4), "solid_joinstyle": "round"}


def _legend(marks: dict[str, Mark]) -> Plot:
    distinct = {mark.method: mark for mark in marks.values()}
    with drawing("tradeoff-legend"):
        handles = [Line2D([], [], label=name, **style_of(mark)) for name, mark in distinct.items()]
        handles.append(Line2D([], [], label="best at its size", **_front_style()))
        width = round(20 + sum(40 + 7 * len(str(handle.get_label())) for handle in handles))
        figure = new_figure(width, 26)
        figure.legend(
            handles=handles, loc="center left", ncols=len(handles), handlelength=1.2, columnspacing=1.3, borderaxespad=0
        )
        svg = to_svg(figure, "tradeoff-legend", f"Marks: {', '.join(distinct)}")
    return Plot("tradeoff-legend", "", "", svg, width)
