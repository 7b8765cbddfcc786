"""The facts of a run, as one JSON value: the content of report.json and all that the report shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeprune.anatomy.sizes import pruned_sizes
from moeprune.calibrate.load import load_entropy, load_share
from moeprune.calibrate.stats import Stats
from moeprune.files import read_json
from moeprune.plan.plan import Plan, num_to_keep
from moeprune.recipe import ORIGINAL, PlanSettings, dump_recipe
from moeprune.run.stages import stages
from moeprune.run.state import RunState
from moeprune.run.workspace import Workspace
from moeprune.score import SCORES


def collect_facts(space: Workspace, state: RunState) -> dict[str, Any]:
    """Read the files of a finished run into the facts of its report."""
    stats = Stats.load(space.stats_path)
    # A run folder may also hold what an earlier recipe measured, of other plans under the same names.
    evaluated = read_json(space.out / "eval.json") if space.recipe.evaluate else {"models": {}, "paired": {}}
    speed = read_json(space.out / "throughput.json") if space.recipe.throughput else {}
    variants = [_variant(space, None, evaluated, speed), *(_variant(space, s, evaluated, speed) for s in space.plans)]
    facts = {
        "format": 1,
        "title": space.recipe.title,
        "model": _model(space),
        "calibration": {
            "tokens": int(stats.tokens.sum()),
            "domains": {name: int(n) for name, n in zip(stats.domains, stats.tokens, strict=True)},
            "seconds": stats.runs[0]["seconds"],
        },
        "baseline": ORIGINAL,
        "variants": variants,
        "router": _router(space, stats),
        "recipe_yaml": dump_recipe(space.recipe),
        "command": state.data["command"],
        "environment": state.data["versions"],
        "seconds": {stage.name: state.stages[stage.name]["seconds"] for stage in stages(space)},
    }
    if space.recipe.exported:
        verified = read_json(space.out / "verify.json")
        facts["verify"] = {"passed": all(check["passed"] for check in verified), "checks": verified}
    return facts


def _model(space: Workspace) -> dict[str, Any]:
    facts, config = space.source.facts, space.source.anatomy.config
    return {
        "name": facts.name,
        "source": facts.name,
        "model_type": facts.model_type,
        "num_layers": config.get_text_config(decoder=True).num_hidden_layers,
        "num_moe_layers": len(facts.layers),
        "num_experts": facts.num_experts,
        "top_k": facts.top_k,
        "router": facts.routing.describe(),
    }


def _variant(
    space: Workspace, settings: PlanSettings | None, evaluated: dict[str, Any], speed: dict[str, Any]
) -> dict[str, Any]:
    name = settings.name if settings else ORIGINAL
    facts = space.source.facts
    plan: Plan | None = space.plan(name) if settings else None
    num_experts, top_k = (plan.num_experts, plan.top_k) if plan else (facts.num_experts, facts.top_k)
    sizes = pruned_sizes(space.sizes, num_experts=num_experts, top_k=top_k)
    variant: dict[str, Any] = {
        "name": name,
        "num_experts": num_experts,
        "top_k": top_k,
        "score": settings.score if settings and num_experts < facts.num_experts else None,
        "keep": num_experts / facts.num_experts,
        "parameters": sizes.parameters_after,
        "active_parameters": sizes.active_after,
        "bytes": sizes.bytes_after,
        "exported": settings is not None and name == space.recipe.exported,
        "warnings": _remarks(plan, settings) if plan and settings else [],
    }
    if name in evaluated["models"]:
        result = evaluated["models"][name]
        variant |= {"results": result["results"], "groups": result["groups"]}
    if name in evaluated["paired"]:
        variant["paired"] = evaluated["paired"][name]
    if name in speed:
        variant["throughput"] = speed[name]
    return variant


def _remarks(plan: Plan, settings: PlanSettings) -> list[str]:
    """Its warnings, and why it has another number of experts than was asked for and may be its name."""
    asked = num_to_keep(plan.model, keep=settings.keep or 1.0, n_group=plan.n_group)
    if "chosen" not in plan.method or plan.num_experts == asked:
        return list(plan.warnings)
    engines = ", ".join(dict.fromkeys(serving["engine"] for serving in plan.method["for"]))
    return [f"chosen for {engines}: {plan.method['chosen']}", *plan.warnings]


def _router(space: Workspace, stats: Stats) -> dict[str, Any]:
    counts = stats.experts["count"]
    score = next((settings.score for settings in space.plans if settings.prunes and settings.score != "random"), "reap")
    router: dict[str, Any] = {
        "layers": list(stats.model.layers),
        "domains": list(stats.domains),
        "load": _rows(load_share(counts.sum(axis=0))),
        "load_by_domain": {name: _rows(load_share(counts[at])) for at, name in enumerate(stats.domains)},
        "entropy": [round(float(value), 4) for value in load_entropy(counts.sum(axis=0))],
        "saliency": {"score": score, "values": _rows(SCORES.get(score).saliency(stats))},
    }
    exported = space.recipe.exported
    if exported is not None:
        after = space.out / "after.safetensors"
        router["kept"] = {exported: [list(layer.keep) for layer in space.plan(exported).layers]}
        router["after"] = {exported: _rows(load_share(Stats.load(after).experts["count"].sum(axis=0)))}
    return router


def _rows(values: np.ndarray) -> list[list[float]]:
    """A matrix as lists, to six significant digits: it is read by people and plots."""
    return [[float(f"{value:.6g}") for value in row] for row in values]
