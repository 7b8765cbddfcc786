"""What follows from the facts without words: scores, families of domains, differences, sizes, the best at each size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeprune.report.facts import Facts, Result, Variant
from moeprune.report.metrics import Kind, kind_of, metric_label, score_label

_TASK_KINDS = (Kind.CHOICE, Kind.GENERATION)
SURE = 2.0
"""A difference is called measurable when it exceeds this many standard errors."""


@dataclass(frozen=True)
class Score:
    """A column of the main table: a group of tasks, or a task of no group."""

    name: str
    metric: str
    higher_is_better: bool
    label: str

    @property
    def kind(self) -> Kind:
        """Multiple choice, generation, loss or other."""
        return kind_of(self.metric)


@dataclass(frozen=True)
class Family:
    """Tasks of one metric that are read side by side, usually one a domain."""

    title: str
    metric: str
    higher_is_better: bool
    group: str | None
    tasks: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def member(self) -> str:
        """What one of its tasks stands for: the tasks of a group are domains, others are just tasks."""
        return "task" if self.group is None else "domain"

    @property
    def kind(self) -> Kind:
        """Multiple choice, generation, loss or other."""
        return kind_of(self.metric)


@dataclass(frozen=True)
class Difference:
    """Variant minus original; ``paired`` when it was taken item by item."""

    value: float
    stderr: float | None
    paired: bool

    @property
    def measurable(self) -> bool:
        """True when the difference exceeds two standard errors."""
        return self.stderr is not None and abs(self.value) > SURE * self.stderr

    def worse(self, higher_is_better: bool) -> bool:
        """True when the change goes in the unwanted direction."""
        return self.value < 0 if higher_is_better else self.value > 0


def scores(facts: Facts) -> list[Score]:
    """Groups, then tasks of no group, ordered by kind; each once, in the order the variants name them."""
    found: dict[str, Result] = {}
    grouped = {task for variant in facts.variants for group in variant.groups.values() for task in group.tasks}
    for variant in _original_first(facts):
        for name, result in variant.groups.items():
            found.setdefault(name, result)
        for name, result in variant.results.items():
            if name not in grouped:
                found.setdefault(name, result)
    shared = _shared_word(list(found))
    order = list(Kind)
    return sorted(
        (
            Score(name, result.metric, result.higher_is_better, score_label(name.removeprefix(shared), result.metric))
            for name, result in found.items()
        ),
        key=lambda score: order.index(score.kind),
    )


def families(facts: Facts) -> list[Family]:
    """Each group with two or more tasks, and the tasks of no group that share a metric, ordered by kind."""
    found: dict[str, Family] = {}
    labels = {score.name: score.label for score in scores(facts)}
    for variant in _original_first(facts):
        for name, group in variant.groups.items():
            if len(group.tasks) > 1 and name not in found:
                domains = tuple(task.removeprefix(f"{name}_") for task in group.tasks)
                found[name] = Family(
                    labels[name], group.metric, group.higher_is_better, name, tuple(group.tasks), domains
                )
    loose: dict[tuple[str, bool], list[str]] = {}
    for score in scores(facts):
        if not any(score.name in variant.groups for variant in facts.variants):
            loose.setdefault((score.metric, score.higher_is_better), []).append(score.name)
    for (metric, higher), tasks in loose.items():
        if len(tasks) > 1:
            kind = kind_of(metric)
            title = f"{kind.lower()} {metric_label(metric)}" if kind in _TASK_KINDS else metric_label(metric)
            found[f"loose {metric}"] = Family(title, metric, higher, None, tuple(tasks), tuple(tasks))
    order = list(Kind)
    return sorted(found.values(), key=lambda family: order.index(family.kind))


def result_of(variant: Variant, name: str) -> Result | None:
    """A variant's score on a group or task."""
    return variant.groups.get(name) or variant.results.get(name)


def difference(facts: Facts, variant: Variant, name: str) -> Difference | None:
    """How a variant differs from the original: paired where the facts pair it, else from the two values."""
    if variant.name == facts.baseline:
        return None
    paired = variant.paired.get(name)
    if paired is not None:
        return Difference(paired.difference, paired.stderr, True)
    mine, reference = result_of(variant, name), result_of(facts.original, name)
    if mine is None or reference is None:
        return None
    known = mine.stderr is not None and reference.stderr is not None
    stderr = math.hypot(mine.stderr or 0.0, reference.stderr or 0.0) if known else None
    return Difference(mine.value - reference.value, stderr, False)


def byte_share(facts: Facts, variant: Variant) -> float:
    """Stored size as a share of the original's."""
    return variant.bytes / facts.original.bytes


def active_share(facts: Facts, variant: Variant) -> float:
    """Parameters read for one token as a share of the original's."""
    return variant.active_parameters / facts.original.active_parameters


def harm(facts: Facts, variant: Variant, score: Score) -> float | None:
    """How much worse a variant is: relative increase for what should be low, absolute loss for what should be high."""
    change, reference = difference(facts, variant, score.name), result_of(facts.original, score.name)
    if change is None or reference is None:
        return None
    if score.higher_is_better:
        return -change.value
    return change.value / reference.value if reference.value else change.value


def best_by(facts: Facts) -> list[Score]:
    """The scores, all of one kind, that decide between variants of one size: losses if there are any."""
    every = scores(facts)
    for kind in (Kind.LOSS, Kind.CHOICE, Kind.GENERATION, Kind.OTHER):
        chosen = [score for score in every if score.kind == kind]
        if chosen:
            return chosen
    return []


def best_at_each_size(facts: Facts) -> list[tuple[Variant, list[Variant]]]:
    """For each (experts, top-k) of the slimmed variants the best one and its rivals; the largest size first."""
    judged = best_by(facts)
    sizes: dict[tuple[int, int], list[Variant]] = {}
    for variant in facts.slimmed:
        sizes.setdefault((variant.num_experts, variant.top_k), []).append(variant)

    def mean_harm(variant: Variant) -> float:
        harms = [found for score in judged if (found := harm(facts, variant, score)) is not None]
        return sum(harms) / len(harms) if harms else math.inf

    chosen = []
    for rivals in sizes.values():
        best = min(rivals, key=mean_harm)
        chosen.append((best, [rival for rival in rivals if rival is not best]))
    return sorted(chosen, key=lambda pair: (-pair[0].bytes, -pair[0].active_parameters))


def _original_first(facts: Facts) -> list[Variant]:
    return [facts.original, *facts.slimmed]


def _shared_word(names: list[str]) -> str:
    """The first word of all names with its underscore, where every name has it and more."""
    words = {name.split("_", 1)[0] for name in names}
    return f"{words.pop()}_" if len(names) > 1 and len(words) == 1 and all("_" in name for name in names) else ""
