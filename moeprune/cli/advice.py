"""What a plan costs in the engines, in a line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moeprune.deploy.advise import advise
from moeprune.deploy.check import check
from moeprune.deploy.facts import facts_of_config, facts_of_model
from moeprune.deploy.rule import ERROR, RULES, WANTED
from moeprune.deploy.serving import Serving
from moeprune.plan.plan import Plan


def advice(plan: Plan, *, where: Sequence[Serving] = (), config: dict[str, Any] | None = None) -> Iterator[str]:
    """Errors and warnings of the pruned model, and where an engine is given, the errors that could not be looked for.

    Args:
        plan: The plan.
        where: The engines that it was made for. Without any, all engines are asked, on one device, and only what the
            original model does not have is told.
        config: config.json of the original, which lets more rules be checked.
    """
    before = facts_of_model(plan.model)
    if config is not None:
        before = facts_of_config(config, model=plan.model, most=plan.model.num_experts)
    after = before.pruned(num_experts=plan.num_experts, top_k=plan.top_k, n_group=plan.n_group)
    if any((serving.tp, serving.gpu) != (1, None) for serving in where):
        unchecked = [
            name for name, missing in check(after, where).unchecked.items() if _is_about_storage(name, missing)
        ]
        if unchecked:
            yield (
                f"not checked, because it is not in the statistics: {', '.join(sorted(unchecked))}. Run `moeprune "
                "check` with the plan, --model and the same options."
            )
    for finding in advise(after, before=None if where else before, where=where):
        yield f"({', '.join(finding.engines)}) {finding.what} {finding.instead}"


def _is_about_storage(rule: str, missing: Sequence[str]) -> bool:
    """Whether a rule that may find an error lacks only how wide the experts are and how they are stored."""
    return RULES.get(rule).severity == ERROR and not {WANTED["config"], WANTED["gpu"]} & set(missing)
