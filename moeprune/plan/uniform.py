"""The same number of experts in every layer: the budget that config.json and every engine understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from moeprune.calibrate.coverage import super_experts
from moeprune.calibrate.stats import Stats
from moeprune.deploy.choose import choose_count, require_count
from moeprune.deploy.facts import facts_of_model
from moeprune.deploy.serving import Serving
from moeprune.errors import PlanError
from moeprune.facts import ModelFacts
from moeprune.plan.caveats import caveats
from moeprune.plan.plan import LayerPlan, Plan, check_sizes, num_to_keep
from moeprune.score import SCORES


def make_plan(
    stats: Stats,
    *,
    score: str,
    keep: float | None = None,
    keep_experts: int | None = None,
    top_k: int | None = None,
    groups: bool = True,
    mtp: Literal["prune", "drop"] = "prune",
    where: Sequence[Serving] = (),
    domains: Mapping[str, float] | None = None,
    seed: int = 0,
    stats_sha256: str | None = None,
) -> Plan:
    """Choose the experts of every layer by one criterion.

    Args:
        stats: Calibration statistics.
        score: Name of the criterion (:data:`moeprune.score.SCORES`).
        keep: Share of experts to keep; by default all.
        keep_experts: Number of experts a layer to keep, instead of ``keep``.
        top_k: Active experts a token; by default the model's own.
        groups: Whether group-limited routing stays. Without it the best experts are chosen across groups, and a token
            may use any of them, which it could not before.
        mtp: Multi-token prediction layers: pruned with the experts of the last layer, or left out.
        where: Engines that are to serve the result. The number nearest to ``keep`` that they serve well is taken; an
            explicit ``keep_experts`` that one of them cannot serve is refused.
        domains: Share of each domain in the mix (:meth:`moeprune.calibrate.stats.Stats.mixed`).
        seed: For criteria that draw random numbers.
        stats_sha256: Hash of the statistics file, for the record.

    Raises:
        PlanError: If the counts are impossible, also for an engine of ``where``, or the criterion is unknown.
        StatsError: If a domain is unknown, or the statistics lack a sum that the criterion needs.
    """
    model = stats.model
    sizes = choose_sizes(model, keep=keep, keep_experts=keep_experts, top_k=top_k, groups=groups, where=where)
    count, active, n_group = sizes.num_experts, sizes.top_k, sizes.n_group
    criterion = SCORES.get(score)
    sums = stats.mixed(domains)
    saliency = criterion.saliency(stats, domains=domains, seed=seed)
    chosen = best_experts(saliency, count=count, n_group=n_group or model.routing.n_group)
    # Mixing rescales the counts; whether an expert was seen often enough is a matter of the tokens that were run.
    taking_part = [domains is None or domains.get(name, 0) > 0 for name in stats.domains]
    seen = stats.experts["count"][taking_part].sum(axis=0)
    plan = Plan(
        model=model,
        num_experts=count,
        top_k=active,
        layers=tuple(
            LayerPlan(layer=name, keep=tuple(int(i) for i in ids))
            for name, ids in zip(model.layers, chosen, strict=True)
        ),
        n_group=n_group,
        mtp=mtp,
        method={
            "score": score,
            "formula": criterion.formula,
            "source": criterion.source,
            "keep": count / model.num_experts,
            "domains": dict(domains) if domains else None,
            "seed": seed,
            "calibration_tokens": int(stats.tokens.sum()),
            "stats_sha256": stats_sha256,
            **sizes.served,
        },
        warnings=tuple(
            caveats(
                model,
                chosen,
                routed=sums["count"],
                seen=seen,
                top_k=active,
                n_group=n_group,
                super_experts=super_experts(stats) or (),
            )
        ),
    )
    plan.check()
    return plan


@dataclass(frozen=True)
class Sizes:
    """What a plan changes of a model's configuration.

    Attributes:
        num_experts: Experts that stay in every layer.
        top_k: Active experts a token.
        n_group: 1 where group-limited routing is turned off, None where it stays as it is.
        served: For the record, the engines that the number was chosen for, and why it is this one.
    """

    num_experts: int
    top_k: int
    n_group: Literal[1] | None
    served: Mapping[str, Any]


def choose_sizes(
    model: ModelFacts,
    *,
    keep: float | None = None,
    keep_experts: int | None = None,
    top_k: int | None = None,
    groups: bool = True,
    where: Sequence[Serving] = (),
) -> Sizes:
    """How many experts stay and how many are active; arguments and errors are those of :func:`make_plan`."""
    if keep is not None and keep_experts is not None:
        raise PlanError(f"got --keep {keep} and --keep-experts {keep_experts}. Give one of them.")
    n_group = None if groups else 1
    share = 1.0 if keep is None else keep
    count = keep_experts if keep_experts is not None else num_to_keep(model, keep=share, n_group=n_group)
    active = model.top_k if top_k is None else top_k
    served: dict[str, Any] = {}
    if where and keep_experts is None:
        deployed = facts_of_model(model, top_k=active, n_group=n_group)
        choice = choose_count(deployed, where, asked=count)
        count, served = choice.num_experts, {"chosen": str(choice)}
    check_sizes(model, num_experts=count, top_k=active, n_group=n_group)
    if where:
        require_count(facts_of_model(model, num_experts=count, top_k=active, n_group=n_group), where)
        served["for"] = [asdict(serving) for serving in where]
    return Sizes(count, active, n_group, served)


def best_experts(
    saliency: Float64[ndarray, "layers experts"], *, count: int, n_group: int = 1
) -> list[Int64[ndarray, " kept"]]:
    """Ids of the most salient experts of each layer, ascending; the same number from each group.

    Equal saliencies are decided by the lower id, so that a plan does not depend on the sorting algorithm.
    """
    num_layers, num_experts = saliency.shape
    grouped = saliency.reshape(num_layers, n_group, num_experts // n_group)
    ranked = np.argsort(-grouped, axis=-1, kind="stable")[..., : count // n_group]
    ids = ranked + (np.arange(n_group) * (num_experts // n_group))[None, :, None]
    return [np.sort(layer.reshape(-1)) for layer in ids]
