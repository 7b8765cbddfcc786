"""Hold a model against the rules of one or more engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import moeprune.deploy.rules  # noqa: F401  # fills the table
from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.rule import ERROR, RULES, SEVERITIES
from moeprune.deploy.serving import Serving


@dataclass(frozen=True)
class Finding:
    """One rule that a model breaks.

    Attributes:
        rule: The rule's id.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        engines: The engines that it was found for, with the same words.
        what: What is wrong.
        instead: What to choose instead.
    """

    rule: str
    severity: str
    engines: tuple[str, ...]
    what: str
    instead: str

    def __str__(self) -> str:
        return f"{self.severity} ({', '.join(self.engines)}) {self.what} {self.instead}"


@dataclass(frozen=True)
class Report:
    """What was found, and what could not be looked at.

    Attributes:
        findings: Errors first, then warnings, then remarks.
        unchecked: Rules that lacked a fact, with the names of the facts. Never to be taken for passed.
        passed: Rules that hold for every engine they were checked for.
    """

    findings: tuple[Finding, ...]
    unchecked: dict[str, tuple[str, ...]]
    passed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return all(finding.severity != ERROR for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self) | {"ok": self.ok}


def check(facts: DeployFacts, where: Iterable[Serving]) -> Report:
    """Check a model against every rule.

    Args:
        facts: The model.
        where: The engines and how they spread it.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    unchecked: dict[str, tuple[str, ...]] = {}
    passed: set[str] = set()
    for serving in where:
        for name in RULES:
            rule = RULES.get(name)
            if serving.engine not in rule.engines:
                continue
            if missing := rule.missing(facts, serving):
                unchecked[name] = missing
            elif (problem := rule.check(facts, serving)) is None:
                passed.add(name)
            else:
                found.setdefault((name, problem.what, problem.instead), []).append(serving.engine)
    findings = [Finding(name, RULES.get(name).severity, tuple(e), what, tip) for (name, what, tip), e in found.items()]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    broken = {finding.rule for finding in findings}
    return Report(tuple(findings), unchecked, tuple(sorted(passed - broken)))
