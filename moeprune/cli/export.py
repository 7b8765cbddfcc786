"""``moeprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Force, Json, ModelArgument, Quiet, print_json


def export(
    model: ModelArgument,
    plan: Annotated[Path, typer.Option(help="A plan of `moeprune plan`.")],
    out: Annotated[Path, typer.Option(help="Folder to make; of a GGUF file, the file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the slimmed checkpoint by copying bytes; the model is never loaded.

    A GGUF file becomes a GGUF file, quantised as it is; the plan is that of the Hugging Face model it was made from.

    Example: `moeprune export demo --plan plan.json --out demo-48x6`
    """
    if model.endswith(".gguf"):
        from moeprune.cli.gguf import export_file

        export_file(model, plan=plan, out=out, dry_run=dry_run, force=force, quiet=quiet, as_json=as_json)
        return
    from moeprune.checkpoint.folder import read_config
    from moeprune.cli.advice import advice
    from moeprune.export.export import export_checkpoint
    from moeprune.format import count, size
    from moeprune.plan.plan import Plan

    made = Plan.load(plan)
    summary = export_checkpoint(model, plan=made, out=out, force=force, dry_run=dry_run, quiet=quiet)
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        sizes = summary.sizes
        typer.echo(f"{out}{' (dry run: nothing was written)' if dry_run else ''}")
        typer.echo(f"  {size(sizes.bytes_before)} -> {size(sizes.bytes_after)} in {summary.shards} shard(s)")
        typer.echo(f"  parameters {count(sizes.parameters_before)} -> {count(sizes.parameters_after)}")
        typer.echo(f"  active     {count(sizes.active_before)} -> {count(sizes.active_after)}")
        typer.echo(
            f"  tensors    {summary.tensors_kept} copied, {summary.tensors_sliced} sliced, "
            f"{summary.tensors_dropped} dropped"
        )
        for line in advice(made, config=read_config(summary.source)):
            typer.echo(f"advice: {line}", err=True)
