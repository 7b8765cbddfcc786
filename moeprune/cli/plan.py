"""``moeprune plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Force, Json, Quiet, Seed, print_json, refuse_existing


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
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose the experts that stay, and how many are active. Loads no model.

    Example: `moeprune plan stats.safetensors --score reap --keep 0.75 --top-k 6 --out plan.json`
    """
    refuse_existing(out, force=force)
    from moeprune.calibrate.stats import Stats
    from moeprune.files import sha256_file
    from moeprune.plan.uniform import make_plan

    made = make_plan(
        Stats.load(stats),
        score=score,
        keep=keep,
        keep_experts=keep_experts,
        top_k=top_k,
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
        for warning in made.warnings:
            typer.echo(f"warning: {warning}", err=True)


def parse_domains(text: str) -> dict[str, float]:
    """Read ``code=0.7,math=0.3``.

    Raises:
        PlanError: If it is anything else.
    """
    from moeprune.errors import PlanError

    shares = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        try:
            shares[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise PlanError(f"--domain {text}: expected NAME=SHARE pairs such as code=0.7,math=0.3, got {part!r}.")
    return shares
