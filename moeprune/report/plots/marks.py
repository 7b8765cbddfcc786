"""One look for each way to slim a model: shape and colour by method, hollow where fewer experts are active too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeprune.report.facts import Facts, Variant
from moeprune.report.palette import LIGHT, SERIES
from moeprune.report.plots.figure import points

_SHAPES = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Mark:
    """How a variant is drawn, and the words for it in the legend."""

    method: str
    shape: str
    colour: str
    hollow: bool


def marks_of(facts: Facts) -> dict[str, Mark]:
    """Shape and colour by method in order of appearance; the control ``random`` is grey, the original black."""
    methods = list(dict.fromkeys(v.score for v in facts.slimmed if v.score is not None and v.score != "random"))
    free = [name for name in SERIES if name != "green"]
    looks = {name: (_SHAPES[i % len(_SHAPES)], free[i % len(free)]) for i, name in enumerate(methods)}
    return {variant.name: _mark(facts, variant, looks) for variant in facts.variants}


def style_of(mark: Mark) -> dict[str, Any]:
    """The mark as arguments of ``Axes.plot``."""
    return {
        "linestyle": "none",
        "marker": mark.shape,
        "markersize": points(15 if mark.shape == "*" else 10),
        "markerfacecolor": LIGHT["paper"] if mark.hollow else LIGHT[mark.colour],
        "markeredgecolor": LIGHT[mark.colour] if mark.hollow else LIGHT["paper"],
        "markeredgewidth": points(2.0 if mark.hollow else 1.2),
    }


def _mark(facts: Facts, variant: Variant, looks: dict[str, tuple[str, str]]) -> Mark:
    fewer = variant.top_k != facts.original.top_k
    if variant.name == facts.baseline:
        return Mark("original", "*", "ink", False)
    if variant.score is None:
        return Mark("smaller top-k only" if fewer else "other", "d", "green", True)
    shape, colour = ("X", "faint") if variant.score == "random" else looks[variant.score]
    return Mark(f"{variant.score}, smaller top-k" if fewer else variant.score, shape, colour, fewer)
