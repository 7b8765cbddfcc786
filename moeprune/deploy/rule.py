"""What a deployability rule is, and the table of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

from moeprune.deploy.facts import DeployFacts
from moeprune.deploy.serving import ENGINES, Serving
from moeprune.errors import DeployError
from moeprune.registry import Registry

ERROR, WARNING, INFO = SEVERITIES = ("error", "warning", "info")
VLLM, SGLANG, LLAMA_CPP, TRANSFORMERS = ENGINES
SERVERS = (VLLM, SGLANG)
# How the facts that a rule may lack are called in front of people.
WANTED = {
    "config": "config.json", "top_k": "one top-k", "group_score": "how groups are scored",
    "scoring": "how the router scores", "renormalised": "whether the router renormalises",
    "bias": "whether the router has a correction bias", "expert_width": "the experts' width",
    "shared_experts": "the shared experts", "quantisation": "how the experts are stored", "gpu": "--gpu",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a rule found.

    Attributes:
        what: What is wrong, and what the engine then does.
        instead: What to choose instead.
    """

    what: str
    instead: str


@dataclass(frozen=True)
class Rule:
    """One constraint.

    Attributes:
        name: Its id.
        engines: The engines it holds for.
        severity: ``"error"`` (does not load, crashes or answers wrongly), ``"warning"`` (works, but slower or otherwise
            than it could), ``"info"``.
        needs: Facts without which it cannot be checked: fields of :class:`DeployFacts`, or ``"gpu"``.
        check: The rule itself; None means that all is well.
    """

    name: str
    engines: tuple[str, ...]
    severity: str
    needs: tuple[str, ...]
    check: Callable[[DeployFacts, Serving], Problem | None]

    def missing(self, facts: DeployFacts, serving: Serving) -> tuple[str, ...]:
        """The facts it needs and does not have, named for people."""
        held = {"gpu": serving.gpu} | {name: getattr(facts, name, None) for name in self.needs if name != "gpu"}
        return tuple(WANTED[name] for name in self.needs if held[name] is None)

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return self._paragraphs()[0]

    @property
    def source(self) -> str:
        """Where the constraint was read: the paragraph of its docstring that begins with ``Source:``."""
        (source,) = (text for text in self._paragraphs() if text.startswith("Source:"))
        return source.removeprefix("Source:").strip()

    def _paragraphs(self) -> list[str]:
        return [" ".join(text.split()) for text in (inspect.getdoc(self.check) or "").split("\n\n")]


RULES: Registry[Rule] = Registry("rule", DeployError)


def rule(
    name: str, severity: str, engines: tuple[str, ...], *, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[DeployFacts, Serving], Problem | None]], Callable[[DeployFacts, Serving], Problem | None]]:
    """Register a function as a rule. Its docstring says the constraint and, after ``Source:``, where it was read."""
    known = {field.name for field in fields(DeployFacts)} | {"gpu"}
    assert severity in SEVERITIES and set(engines) <= set(ENGINES) and set(needs) <= known & set(WANTED), name

    def register(function):
        RULES.register(name, Rule(name, engines, severity, needs, function))
        return function

    return register


def nearest(facts: DeployFacts, fits: Callable[[int], bool]) -> str:
    """The nearest numbers of experts below and above that fit, for messages: ``"40 or 48"``; empty if there is none.

    Above means at most the model's own number before pruning, or twice the present one if that is not known; below at
    least the top-k.
    """
    least, most = max(1, facts.top_k or 1), facts.most or 2 * facts.num_experts
    below = next((n for n in range(facts.num_experts - 1, least - 1, -1) if fits(n)), None)
    above = next((n for n in range(max(facts.num_experts + 1, least), most + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def is_power_of_two(number: int) -> bool:
    """Whether it is 1, 2, 4, ..."""
    return number > 0 and number & (number - 1) == 0
