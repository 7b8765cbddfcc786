"""The sentences of a report: what the numbers say, computed and never written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.format import percent
from moeprune.report.comparison import (
    SURE,
    Family,
    Score,
    active_share,
    best_at_each_size,
    best_by,
    byte_share,
    difference,
    families,
    result_of,
    scores,
)
from moeprune.report.facts import Facts, Variant
from moeprune.report.metrics import Kind, is_share, metric_label, unit_of, write_change, write_error

CLIFF_FACTOR = 2.0
"""A cliff is at least this many times the mean of the other domains..."""
CLIFF_SURE = 3.0
"""...and further from it than this many standard errors: many domains are looked at, so two would be too few..."""
CLIFF_RELATIVE = 0.03
"""...and not a trifle: a loss must rise by 3 %..."""
CLIFF_POINTS = 0.05
"""...or a score fall by 5 points."""
_MIN_DOMAINS = 3


@dataclass(frozen=True)
class Cliff:
    """A domain that suffers much more than the others. ``times`` is infinite where the others do not suffer at all."""

    variant: str
    domain: str
    family: str
    harm: float
    others: float
    sentence: str

    @property
    def times(self) -> float:
        """How many times worse than the mean of the other domains."""
        return self.harm / self.others if self.others > 0 else math.inf


@dataclass(frozen=True)
class Card:
    """The best variant of one size in a few numbers."""

    variant: Variant
    size: str
    byte_share: float
    active_share: float
    changes: tuple[tuple[str, str, str], ...]
    choice: str
    recommended: bool


def size_words(facts: Facts, variant: Variant) -> str:
    """``48 of 64 experts, top-6``."""
    total = facts.original.num_experts
    experts = f"{variant.num_experts} of {total} experts" if variant.num_experts != total else f"all {total} experts"
    return f"{experts}, top-{variant.top_k}"


def cost_words(facts: Facts, variant: Variant) -> str:
    """``73 % of the bytes, 70 % of the active parameters``."""
    stored, active = percent(byte_share(facts, variant)), percent(active_share(facts, variant))
    return f"{stored} of the bytes, {active} of the active parameters"


def change_words(facts: Facts, variant: Variant, name: str, metric: str) -> str | None:
    """``-0.4 ± 0.6 points``, or ``+0.031 ± 0.004``; None where nothing can be compared."""
    change = difference(facts, variant, name)
    if change is None:
        return None
    error = f" ± {write_error(change.stderr, metric)}" if change.stderr is not None else ""
    return f"{write_change(change.value, metric)}{error}{' points' if is_share(metric) else ''}"


def verdict(facts: Facts) -> tuple[Variant | None, str]:
    """The headline, and the variant it recommends: the smallest one without a measurable drop on tasks.

    Where there are no tasks, losses decide. None is recommended where every variant drops.
    """
    judged = [score for score in scores(facts) if score.kind != Kind.LOSS] or scores(facts)
    tested = [
        variant
        for variant in facts.slimmed
        if judged and all(difference(facts, variant, score.name) is not None for score in judged)
    ]
    if not tested:
        return None, f"{facts.model.name}: no slimmed variant has been compared with the original yet."
    ordered = sorted(tested, key=lambda variant: (variant.bytes, variant.active_parameters))
    harmless = [variant for variant in ordered if not _measurable_losses(facts, variant, judged)]
    what = "drop in any task score" if judged[0].kind != Kind.LOSS else "rise in loss"
    if harmless:
        best = harmless[0]
        lead = (
            f"The smallest variant without a measurable {what} is {best.name}: "
            f"{size_words(facts, best)}; {cost_words(facts, best)}"
        )
    else:
        best = min(reversed(ordered), key=lambda variant: len(_measurable_losses(facts, variant, judged)))
        lead = (
            f"No variant is without a measurable {what}. "
            f"The mildest is {best.name}: {size_words(facts, best)}; {cost_words(facts, best)}"
        )
    fallen = join_words(list(dict.fromkeys(cliff.domain for cliff in cliffs(facts) if cliff.variant == best.name)))
    end = f". Mind its cliff on {fallen}." if fallen else "."
    return (best if harmless else None), f"{lead}; {_changes_in_words(facts, best)}{end}"


def resolution(facts: Facts) -> str | None:
    """How small a change this run can see: without it, "no measurable loss" says nothing."""
    seen = []
    for score in scores(facts):
        found = (difference(facts, variant, score.name) for variant in facts.slimmed)
        errors = sorted(change.stderr for change in found if change is not None and change.stderr)
        if errors:
            unit = "points in" if is_share(score.metric) else "in"
            seen.append(f"{write_error(SURE * errors[len(errors) // 2], score.metric)} {unit} {score.label}")
    return f"Changes smaller than about {join_words(seen)} cannot be told from chance here." if seen else None


def cards(facts: Facts) -> list[Card]:
    """The best variant at each size, the largest first."""
    recommended, _ = verdict(facts)
    deciding = join_words([score.label for score in best_by(facts)])
    made = []
    for variant, rivals in best_at_each_size(facts):
        changes = []
        for score in scores(facts):
            words = change_words(facts, variant, score.name, score.metric)
            if words is not None:
                changes.append(
                    (score.label, words, tone(facts, variant, score.name, higher_is_better=score.higher_is_better))
                )
        choice = f"chosen over {join_words([rival.name for rival in rivals])} for its {deciding}" if rivals else ""
        made.append(
            Card(
                variant,
                size_words(facts, variant),
                byte_share(facts, variant),
                active_share(facts, variant),
                tuple(changes),
                choice,
                recommended is not None and variant.name == recommended.name,
            )
        )
    return made


def tone(facts: Facts, variant: Variant, name: str, *, higher_is_better: bool) -> str:
    """``worse`` or ``better`` where the difference on a group or task is measurable, else an empty string."""
    change = difference(facts, variant, name)
    if change is None or not change.measurable:
        return ""
    return "worse" if change.worse(higher_is_better) else "better"


def cliffs(facts: Facts) -> list[Cliff]:
    """Domains much worse than the rest of their family, the steepest fall first."""
    found = []
    for family in families(facts):
        for variant in facts.slimmed:
            found.extend(_cliffs_of(facts, family, variant))
    return sorted(found, key=lambda cliff: (-(cliff.harm - cliff.others), cliff.variant, cliff.domain))


def cliff_summary(facts: Facts) -> str | None:
    """One sentence where no domain falls off; None where there are cliffs, or too few domains to look for them."""
    wide = [family for family in families(facts) if len(family.tasks) >= _MIN_DOMAINS]
    if not wide or not facts.slimmed or cliffs(facts):
        return None
    member = "domain" if any(family.group for family in wide) else "task"
    return f"No {member} falls much further than the others in {join_words([family.title for family in wide])}."


def join_words(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _changes_in_words(facts: Facts, variant: Variant) -> str:
    parts = []
    for score in scores(facts):
        words = change_words(facts, variant, score.name, score.metric)
        if words is not None:
            parts.append(f"{score.label} {words}")
    return ", ".join(parts)


def _measurable_losses(facts: Facts, variant: Variant, judged: list[Score]) -> list[Score]:
    """Scores that drop measurably, or by an amount of unknown error, which cannot be called harmless."""
    found = []
    for score in judged:
        change = difference(facts, variant, score.name)
        if change is not None and change.worse(score.higher_is_better) and (change.measurable or change.stderr is None):
            found.append(score)
    return found


def _cliffs_of(facts: Facts, family: Family, variant: Variant) -> list[Cliff]:
    harms: list[tuple[str, str, float, float]] = []
    for task, domain in zip(family.tasks, family.domains, strict=True):
        change, reference = difference(facts, variant, task), result_of(facts.original, task)
        if change is None or reference is None or (not family.higher_is_better and not reference.value):
            continue
        unit = -1.0 if family.higher_is_better else 1.0 / reference.value
        harms.append((task, domain, change.value * unit, abs((change.stderr or 0.0) * unit)))
    if len(harms) < _MIN_DOMAINS:
        return []
    found = []
    for task, domain, harm, error in harms:
        rest = [other for other in harms if other[0] != task]
        others = sum(other[2] for other in rest) / len(rest)
        spread = math.hypot(error, *(other[3] / len(rest) for other in rest))
        least = CLIFF_POINTS if family.higher_is_better else CLIFF_RELATIVE
        steep = harm >= least and harm >= CLIFF_FACTOR * others and harm - others > CLIFF_SURE * spread
        if steep:
            sentence = _cliff_sentence(facts, family, variant, (task, domain, harm, others))
            found.append(Cliff(variant.name, domain, family.title, harm, others, sentence))
    return found


def _cliff_sentence(facts: Facts, family: Family, variant: Variant, found: tuple[str, str, float, float]) -> str:
    task, domain, harm, others = found
    change = difference(facts, variant, task)
    assert change is not None
    amount = write_change(change.value, family.metric)
    if family.higher_is_better:
        unit = " points" if is_share(family.metric) else f" {unit_of(family.metric)}"
        mine, rest = f"{amount}{unit}", f"{write_change(-others, family.metric)}{unit}"
    else:
        mine, rest = f"{amount} ({harm:+.0%})".replace("%", " %"), f"{others:+.1%}".replace("%", " %")
    times = f", {harm / others:.1f} times as much" if others > 0 and harm / others < 100 else ""
    return (
        f"{variant.name} falls off a cliff on {domain}: {metric_label(family.metric)} {mine}, "
        f"while the other {family.member}s change by {rest} on average{times}."
    )
