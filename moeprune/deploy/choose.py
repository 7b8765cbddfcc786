"""Choose a number of experts that an engine can serve well, near the one that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.deploy.check import Finding, check
from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, WARNING, nearest
from moeprune.deploy.serving import Serving
from moeprune.errors import PlanError


@dataclass(frozen=True)
class Choice:
    """A number of experts.

    Attributes:
        num_experts: The number chosen.
        asked: The number asked for.
        avoids: What would have been found at the number asked for, and is not at the chosen one.
    """

    num_experts: int
    asked: int
    avoids: tuple[str, ...]

    def __str__(self) -> str:
        if self.num_experts == self.asked:
            return f"{self.asked} experts fit as asked."
        return f"{self.num_experts} experts instead of {self.asked}: {' '.join(self.avoids)}"


def choose_count(facts: DeployFacts, where: Sequence[Serving], *, asked: int) -> Choice:
    """The number with no error and the fewest warnings near ``asked``; of equals the nearest, then the larger.

    Near means within one step of the numbers that suit devices and groups: the least common multiple of 8, the groups
    and the expert-parallel size. If all numbers there have errors, the nearest one without is taken.

    Args:
        facts: The pruned model; its number of experts does not matter.
        where: The engines and how they spread it.
        asked: The number asked for.

    Raises:
        PlanError: If no number of experts is without errors.
    """
    assert facts.most is not None
    # Whoever asks for fewer experts does not want all of them.
    last = facts.most if asked >= facts.most else facts.most - 1
    found = {number: _problems(facts.with_experts(number), where) for number in range(1, last + 1)}
    sound = [number for number, findings in found.items() if all(f.severity != ERROR for f in findings)]
    if not sound:
        # What stands in the way of the number with the fewest errors is not the number.
        errors = {number: [f for f in findings if f.severity == ERROR] for number, findings in found.items()}
        best = min(errors, key=lambda number: (len(errors[number]), abs(number - asked), -number))
        raise PlanError(
            f"no number of experts fits {_named(where)}. With {best}: "
            + " ".join(f"{error.what} {error.instead}" for error in errors[best])
        )
    step = math.lcm(8, facts.n_group, *(serving.ep for serving in where))
    near = [number for number in sound if abs(number - asked) <= step]
    if near:
        best = min(near, key=lambda number: (len(found[number]), abs(number - asked), -number))
    else:
        best = min(sound, key=lambda number: (abs(number - asked), -number))
    left = {finding.rule for finding in found[best]}
    asked_for = found.get(asked) or _problems(facts.with_experts(asked), where)
    return Choice(best, asked, tuple(finding.what for finding in asked_for if finding.rule not in left))


def require_count(facts: DeployFacts, where: Sequence[Serving]) -> None:
    """Refuse a number of experts that an engine cannot serve.

    Args:
        facts: The pruned model with the number asked for.
        where: The engines and how they spread it.

    Raises:
        PlanError: What is wrong, and the nearest numbers with which nothing is.
    """
    errors = [finding for finding in _problems(facts, where) if finding.severity == ERROR]
    if not errors:
        return

    def fits(number: int) -> bool:
        return all(finding.severity != ERROR for finding in _problems(facts.with_experts(number), where))

    fitting = nearest(facts, fits)
    instead = f"Keep {fitting}, or plan without --for." if fitting else errors[0].instead
    raise PlanError(f"cannot keep {facts.num_experts} experts a layer for {_named(where)}: {errors[0].what} {instead}")


def _named(where: Sequence[Serving]) -> str:
    return ", ".join(dict.fromkeys(serving.engine for serving in where))


def _problems(facts: DeployFacts, where: Sequence[Serving]) -> list[Finding]:
    return [finding for finding in check(facts, where).findings if finding.severity in (ERROR, WARNING)]
