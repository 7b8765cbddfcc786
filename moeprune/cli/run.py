"""``moeprune run``."""

from __future__ import annotations

import shlex
import sys
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
    from moeprune.run.driver import list_stages, run_recipe

    if dry_run:
        listed = list_stages(loaded, out=out, device=device, force=force)
        if as_json:
            print_json({"recipe": loaded.model_dump(mode="json"), "stages": dict(listed)})
            return
        typer.echo(dump_recipe(loaded))
        for name, state in listed:
            typer.echo(f"{name}: {state}")
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
