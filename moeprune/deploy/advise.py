"""What pruning itself changes about where a model can be served: the findings that the original did not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeprune.deploy.check import Finding, check
from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import INFO
from moeprune.deploy.serving import Serving, servings


def advise(after: DeployFacts, *, before: DeployFacts | None = None, where: Sequence[Serving] = ()) -> list[Finding]:
    """Errors and warnings that a pruned model has and the original had not.

    Args:
        after: The pruned model.
        before: The model before pruning; by default everything that is found counts.
        where: The engines and how they spread it; by default every engine on one device.
    """
    where = where or servings()
    old = set() if before is None else _pairs(before, where)
    advice = []
    for finding in check(after, where).findings:
        engines = tuple(engine for engine in finding.engines if (finding.rule, engine) not in old)
        if engines and finding.severity != INFO:
            advice.append(replace(finding, engines=engines))
    return advice


def _pairs(facts: DeployFacts, where: Sequence[Serving]) -> set[tuple[str, str]]:
    return {(finding.rule, engine) for finding in check(facts, where).findings for engine in finding.engines}
