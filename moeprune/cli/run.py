"""``moeprune run``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Device, Json, Quiet, print_json


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    out: Annotated[Path, typer.Option(help="Run folder; a killed or changed run there goes on.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and what is to be done.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start over, dropping what the run folder holds.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Drive a recipe through all stages: calibrate, plan, evaluate, export, verify, report.

    `moeprune ls keys` says what may be written in one, `moeprune ls recipes` lists those that ship with moeprune.

    Example: `moeprune run recipes/quickstart.yaml --out runs/quickstart`
    """
    from moeprune.recipe import dump_recipe, load_recipe
    from moeprune.resources import recipes

    path = Path(recipe)
    if not path.exists() and recipe in recipes():
        path = recipes()[recipe]
    loaded = load_recipe(path)
    from moeprune.run.driver import preview, run_recipe

    if dry_run:
        ahead = preview(loaded, out=out, device=device, force=force)
        if as_json:
            recipe_json, sizes = loaded.model_dump(mode="json", by_alias=True), ahead.sizes.items()
            print_json({"recipe": recipe_json, "stages": ahead.stages, "sizes": {n: asdict(s) for n, s in sizes}})
            return
        typer.echo(dump_recipe(loaded))
        for name, size in ahead.sizes.items():
            chosen = f": {size.served['chosen']}" if "chosen" in size.served else ""
            typer.echo(f"variant {name}: {size.num_experts} experts, top-{size.top_k}{chosen}")
        for name, due in ahead.stages.items():
            typer.echo(f"{name}: {'to do' if due else 'up to date'}")
        return

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    command = shlex.join(["moeprune", *sys.argv[1:]])
    facts = run_recipe(loaded, out=out, command=command, device=device, force=force, quiet=quiet, say=say)
    if as_json:
        print_json(facts)
        return
    from moeprune.report import summary_table

    typer.echo(summary_table(facts))
    typer.echo(f"report: {out / 'report.html'}")
