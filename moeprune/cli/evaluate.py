"""``moeprune eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeprune.cli.options import Device, Dtype, Json, Quiet, Seed, print_json, refuse_existing

if TYPE_CHECKING:
    from moeprune.evaluate import ModelResult


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, Hub ids or `demo`; the first is the baseline.")
    ],
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks or groups, separated by commas; `moeprune ls tasks`.")
    ] = "offline",
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Also evaluate the first model with this plan, without exporting it. Repeatable."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder with task files [default: the offline tasks that ship with moeprune].")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Also write scores and paired differences to this JSON file.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Evaluate models on the same items, with the difference to the first one and its standard error.

    Example: `moeprune eval demo --plan plan.json --tasks offline_choice --limit 100`
    """
    if out is not None:
        refuse_existing(out, force=force, reads=plan or [])
    from moeprune.evaluate import check_tasks, results_table
    from moeprune.evaluate.side_by_side import evaluate_side_by_side, side_by_side_json
    from moeprune.files import write_json
    from moeprune.resources import shipped

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = include or shipped("eval") / "offline"
    check_tasks(names, include_path=folder)
    results: dict[str, ModelResult] = evaluate_side_by_side(
        models, plans=plan or [], tasks=names, include_path=folder, limit=limit, batch_size=batch_size, seed=seed,
        dtype=dtype, device=device, quiet=quiet,
    )  # fmt: skip
    facts = side_by_side_json(results)
    if out is not None:
        write_json(out, facts)
    if as_json:
        print_json(facts)
    else:
        typer.echo(results_table(results, baseline=next(iter(results))))
