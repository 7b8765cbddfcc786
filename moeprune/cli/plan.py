"""``moeprune plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.deploy_options import NAMES, Ep, Gpu, Redundant, Tp
from moeprune.cli.options import Force, Json, Mtp, Quiet, Seed, print_json, refuse_existing


def plan(
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="A statistics file of `moeprune calibrate`.")],
    out: Annotated[Path, typer.Option(help="Plan to write (JSON).")],
    score: Annotated[str, typer.Option(help="Saliency criterion; `moeprune ls scores` lists them.")] = "reap",
    keep: Annotated[float | None, typer.Option(help="Share of experts to keep in every layer [default: 1].")] = None,
    keep_experts: Annotated[int | None, typer.Option(help="Number of experts to keep in every layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Active experts a token [default: the model's].")] = None,
    domain: Annotated[
        str | None,
        typer.Option(help="Share of each calibration domain, such as `code=0.7,math=0.3` [default: as calibrated]."),
    ] = None,
    no_groups: Annotated[
        bool,
        typer.Option(
            "--no-groups",
            help="Turn group-limited routing off: any kept experts may be combined.",
        ),
    ] = False,
    mtp: Annotated[
        Mtp, typer.Option(help="Multi-token prediction layers: pruned like the last layer, or left out.")
    ] = "prune",
    engine: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="ENGINE", help=f"Choose a number that this engine serves well: {NAMES}."),
    ] = None,
    tp: Tp = 1,
    ep: Ep = 1,
    redundant: Redundant = 0,
    gpu: Gpu = None,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose the experts that stay, and how many are active. Loads no model.

    Example: `moeprune plan stats.safetensors --score reap --keep 0.75 --top-k 6 --out plan.json`
    """
    refuse_existing(out, force=force, reads=[stats])
    from moeprune.calibrate.stats import Stats
    from moeprune.cli.advice import advice
    from moeprune.deploy.serving import servings
    from moeprune.errors import PlanError
    from moeprune.files import sha256_file
    from moeprune.plan.uniform import make_plan

    if not engine and (tp, ep, redundant, gpu) != (1, 1, 0, None):
        raise PlanError("--tp, --ep, --redundant and --gpu belong to --for ENGINE, which is missing.")
    where = servings(engine, tp=tp, ep=ep, redundant=redundant, gpu=gpu) if engine else ()
    made = make_plan(
        Stats.load(stats),
        score=score,
        keep=keep,
        keep_experts=keep_experts,
        top_k=top_k,
        groups=not no_groups,
        mtp=mtp,
        where=where,
        domains=parse_domains(domain) if domain else None,
        seed=seed,
        stats_sha256=sha256_file(stats),
    )
    made.save(out)
    if as_json:
        print_json(made.model_dump(mode="json"))
    elif not quiet:
        model = made.model
        typer.echo(
            f"{out}: {made.num_experts} of {model.num_experts} experts in {len(model.layers)} layers, "
            f"top-{made.top_k} of {model.top_k}"
        )
        if "chosen" in made.method:
            typer.echo(f"chosen for {', '.join(engine or [])}: {made.method['chosen']}")
        for warning in made.warnings:
            typer.echo(f"warning: {warning}", err=True)
        for line in advice(made, where=where):
            typer.echo(f"advice: {line}", err=True)


def parse_domains(text: str) -> dict[str, float]:
    """Read ``code=0.7,math=0.3``.

    Raises:
        PlanError: If it is anything else.
    """
    from moeprune.errors import PlanError

    shares = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if name.strip() in shares:
            raise PlanError(f"--domain {text}: {name.strip()} is given twice.")
        try:
            shares[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise PlanError(f"--domain {text}: expected NAME=SHARE pairs such as code=0.7,math=0.3, got {part!r}.")
    return shares
