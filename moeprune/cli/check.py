"""``moeprune check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeprune.cli.deploy_options import NAMES, Ep, Gpu, Redundant, Tp
from moeprune.cli.options import Json, print_json

if TYPE_CHECKING:
    from moeprune.deploy.check import Report
    from moeprune.deploy.facts import DeployFacts
    from moeprune.facts import ModelFacts


def check(
    target: Annotated[str, typer.Argument(metavar="MODEL|PLAN", help="A folder, a Hub id, `demo`, or a plan (JSON).")],
    engine: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE", help=f"{NAMES}; give it again for more [default: all].")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model that a plan is for: adds its config.json.")] = None,
    tp: Tp = 1,
    ep: Ep = 1,
    redundant: Redundant = 0,
    gpu: Gpu = None,
    as_json: Json = False,
) -> None:
    """Say where a checkpoint, or what a plan makes of one, can be served. Exit status 1 if an engine cannot.

    Example: `moeprune check pruned-model --engine vllm --tp 8 --ep 8`
    """
    from moeprune.deploy.check import check as check_rules
    from moeprune.deploy.serving import servings

    where = servings(engine, tp=tp, ep=ep, redundant=redundant, gpu=gpu)
    facts, note = gather(target, model=model)
    report = check_rules(facts, where)
    if as_json:
        print_json(report.to_json() | {"note": note})
    else:
        _print(report, facts, note)
    if not report.ok:
        raise typer.Exit(1)


def gather(target: str, *, model: str | None = None) -> tuple[DeployFacts, str | None]:
    """What is known of a checkpoint or a plan, and a remark if something could not be found out.

    Raises:
        PlanError: If the plan is none, or belongs to another model than ``model``.
        CheckpointError: If there is no config.json.
        UnsupportedModelError: If it has no experts.
        DeployError: If ``model`` is given beside a checkpoint.
    """
    from moeprune.checkpoint.folder import read_config
    from moeprune.checkpoint.hub import locate
    from moeprune.deploy.facts import facts_of_config, facts_of_model
    from moeprune.errors import DeployError
    from moeprune.gguf.file import is_gguf
    from moeprune.plan.plan import Plan

    if is_gguf(target):
        raise DeployError(
            f"{target}: the rules look at config.json, which a GGUF file has not. Check the plan, with --engine "
            "llama.cpp; `moeprune inspect` and `moeprune verify` read GGUF files."
        )
    if not Path(target).is_file():
        if model is not None:
            raise DeployError(f"{target}: --model belongs to a plan, and this is no file.")
        path = locate(target).folder
        known, note = _routing_of(path)
        return facts_of_config(read_config(path), model=known), note
    plan = Plan.load(Path(target))
    if model is None:
        return facts_of_model(plan.model, num_experts=plan.num_experts, top_k=plan.top_k, n_group=plan.n_group), None
    from moeprune.anatomy.source import open_source
    from moeprune.export.prepare import pruned_config

    source = open_source(locate(model).folder)
    plan.check(source.facts)
    raw = pruned_config(source, plan)
    return facts_of_config(raw, model=plan.model, most=plan.model.num_experts), None


def _routing_of(path: Path) -> tuple[ModelFacts | None, str | None]:
    """How the model of a folder routes, or why that is not known."""
    from moeprune.anatomy.derive import derive_anatomy
    from moeprune.anatomy.skeleton import load_config
    from moeprune.errors import CheckpointError, UnsupportedModelError

    try:
        return derive_anatomy(load_config(path)).facts(name=str(path), fingerprint=""), None
    except (CheckpointError, UnsupportedModelError) as error:
        return None, f"its router was not looked at: {error}"


def _print(report: Report, facts: DeployFacts, note: str | None) -> None:
    groups = f", {facts.topk_group} of {facts.n_group} groups" if facts.n_group > 1 else ""
    typer.echo(f"{facts.model_type}: {facts.num_experts} experts, top-{facts.top_k}{groups}")
    for finding in report.findings:
        typer.echo(f"{finding.severity:<8} {finding.rule} ({', '.join(finding.engines)})")
        typer.echo(f"         {finding.what}")
        typer.echo(f"         {finding.instead}")
    typer.echo(f"{len(report.passed)} rules hold.")
    if report.unchecked:
        typer.echo(f"{len(report.unchecked)} rules were not checked, because something is not known:")
        by_reason: dict[tuple[str, ...], list[str]] = {}
        for name, missing in sorted(report.unchecked.items()):
            by_reason.setdefault(missing, []).append(name)
        for missing, names in by_reason.items():
            typer.echo(f"  {', '.join(names)}: {', '.join(missing)}")
    if note is not None:
        typer.echo(f"note: {note}", err=True)
