"""How unevenly the domains suffer: one row a variant, one dot a domain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes

from moeprune.report.comparison import SURE, Family, difference, families
from moeprune.report.facts import Facts, Variant
from moeprune.report.findings import cliffs
from moeprune.report.metrics import Kind, is_share, metric_label, scale_of, write_change
from moeprune.report.palette import LIGHT
from moeprune.report.plots.figure import Plot, add_axes, bare, drawing, new_figure, points, to_svg

_WIDTH, _ROW = 1080, 34
_STRETCH = 12.0
_FEWEST = 3


@dataclass(frozen=True)
class _Dot:
    domain: str
    change: float
    error: float
    cliff: bool


def domain_plots(facts: Facts) -> list[Plot]:
    """One plot a family with three domains or more, losses first: there small harm shows earliest."""
    wide = [family for family in families(facts) if len(family.tasks) >= _FEWEST]
    made = []
    for family in sorted(wide, key=lambda family: family.kind != Kind.LOSS):
        rows = [(variant, dots) for variant in facts.slimmed if (dots := _dots(facts, family, variant))]
        if rows:
            made.append(_plot(family, rows, f"domains-{len(made)}"))
    return made


def _dots(facts: Facts, family: Family, variant: Variant) -> list[_Dot]:
    fallen = {(cliff.variant, cliff.family, cliff.domain) for cliff in cliffs(facts)}
    scale, dots = scale_of(family.metric), []
    for task, domain in zip(family.tasks, family.domains, strict=True):
        change = difference(facts, variant, task)
        if change is not None:
            error = SURE * (change.stderr or 0.0) * scale
            dots.append(_Dot(domain, change.value * scale, error, (variant.name, family.title, domain) in fallen))
    return dots


def _plot(family: Family, rows: list[tuple[Variant, list[_Dot]]], name: str) -> Plot:
    label = f"{metric_label(family.metric)}, change from the original{' (points)' if is_share(family.metric) else ''}"
    with drawing(name):
        figure = new_figure(_WIDTH, 54 + _ROW * len(rows))
        axes = add_axes(
            figure, left=26 + 7 * max(len(variant.name) for variant, _ in rows), right=130, top=6, bottom=46
        )
        bare(axes, grid="x")
        stretched = _set_scale(axes, [dot for _, dots in rows for dot in dots], family)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [variant.name for variant, _ in rows])
        for tick in axes.get_yticklabels():
            tick.set_color(LIGHT["ink"])
        axes.axvline(0, color=LIGHT["muted"], linewidth=points(1.3))
        for row, (_, dots) in enumerate(rows):
            if row:
                axes.axhline(row - 0.5, color=LIGHT["rule"], linewidth=points(1), zorder=0)
            _draw_row(axes, row, dots, family)
        axes.set_xlabel(label + (", stretched near zero" if stretched else ""))
        svg = to_svg(figure, name, f"{label} by variant and domain")
    caption = (
        f"A dot is a {family.member} with two standard errors to either side; the upright line is the mean; "
        f"the name is the {family.member} that suffers most, orange where it is a cliff."
    )
    return Plot(name, _title(family, rows), caption, svg, _WIDTH)


def _set_scale(axes: Axes, dots: list[_Dot], family: Family) -> bool:
    """Linear; logarithmic away from zero where a loss rises far more in some variants than in most."""
    ends = [dot.change - dot.error for dot in dots] + [dot.change + dot.error for dot in dots]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    sizes = sorted(abs(dot.change) for dot in dots)
    middle = sizes[len(sizes) // 2]
    stretched = not family.higher_is_better and 0 < middle * _STRETCH < sizes[-1]
    if stretched:
        near = 10.0 ** math.floor(math.log10(middle))
        axes.set_xscale("symlog", linthresh=near, linscale=0.7)
        axes.set_xlim(low * 1.1, high * 1.15)
        steps = [near * factor * 10**power for power in range(4) for factor in (1, 2, 5)]
        ticks = [0.0, *(step for step in steps if step <= high)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        pad = 0.04 * ((high - low) or 1.0)
        side = 0.12 * (high - low)
        axes.set_xlim(low - pad - (side if family.higher_is_better else 0.0), high + pad)
    return stretched


def _draw_row(axes: Axes, row: int, dots: list[_Dot], family: Family) -> None:
    sign = -1.0 if family.higher_is_better else 1.0
    mean = sum(dot.change for dot in dots) / len(dots)
    axes.plot([mean, mean], [row - 0.34, row + 0.34], color=LIGHT["ink"], linewidth=points(1.6), zorder=2)
    count = len(dots)
    for i, dot in enumerate(sorted(dots, key=lambda dot: dot.change)):
        y = row + 0.22 * ((i % 3) - 1) if count >= _FEWEST else float(row)
        colour = LIGHT["orange" if dot.cliff else "blue"]
        ends = [dot.change - dot.error, dot.change + dot.error]
        axes.plot(ends, [y, y], color=colour, linewidth=points(1.1), alpha=0.4, zorder=3)
        axes.plot([dot.change], [y], "o", markersize=points(8), color=colour, markeredgewidth=0, alpha=0.9, zorder=4)
    worst = max(dots, key=lambda dot: sign * dot.change)
    edge = worst.change + worst.error if sign > 0 else worst.change - worst.error
    axes.annotate(
        worst.domain,
        (edge, row),
        xytext=(points(8) * sign, 0),
        textcoords="offset points",
        ha="left" if sign > 0 else "right",
        va="center",
        fontsize=points(11.5),
        fontweight="bold" if worst.cliff else "normal",
        color=LIGHT["orange" if worst.cliff else "muted"],
        annotation_clip=False,
    )


def _title(family: Family, rows: list[tuple[Variant, list[_Dot]]]) -> str:
    """The domain that suffers most in most variants, and the largest change; only what is measurable counts."""
    sign = -1.0 if family.higher_is_better else 1.0
    worst = [(max(dots, key=lambda dot: sign * dot.change), variant.name) for variant, dots in rows]
    sure = [(dot, name) for dot, name in worst if sign * dot.change > dot.error]
    metric, unit = metric_label(family.metric), " points" if is_share(family.metric) else ""
    if not sure:
        return f"No {family.member} loses measurably in {metric}"
    names = [dot.domain for dot, _ in sure]
    common = max(dict.fromkeys(names), key=names.count)
    steepest, variant = max(sure, key=lambda pair: sign * pair[0].change)
    amount = f"{write_change(steepest.change / scale_of(family.metric), family.metric)}{unit} {metric}"
    if len(rows) == 1:
        return f"{common} suffers most: {amount}"
    end = f"the largest change is {amount} on {steepest.domain} in {variant}"
    if 2 * names.count(common) > len(rows):
        return f"{common} suffers most in {names.count(common)} of {len(rows)} variants; {end}"
    return f"Which {family.member} suffers most differs between variants; {end}"
