"""What ``export`` and ``verify`` do with a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from moeprune.cli.options import Mtp, print_json


def refuse_options(given: Mapping[str, object]) -> None:
    """Refuse options of `export` that mean nothing for a GGUF file.

    Args:
        given: Value by name; false ones were not given.

    Raises:
        ExportError: If one was given.
    """
    from moeprune.errors import ExportError

    names = [name for name, value in given.items() if value]
    if names:
        raise ExportError(f"{', '.join(names)}: not for a GGUF file, which becomes one file in one pass. Leave it out.")


def export_file(
    model: str, *, plan: Path, out: Path, mtp: Mtp | None, dry_run: bool, force: bool, quiet: bool, as_json: bool
) -> None:
    """Prune a GGUF file and print what was done."""
    from moeprune.format import count, size
    from moeprune.gguf.export import export_gguf
    from moeprune.plan.plan import Plan

    made = Plan.load(plan)
    made = made.model_copy(update={"mtp": mtp}) if mtp else made
    summary = export_gguf(model, plan=made, out=out, dry_run=dry_run, force=force, quiet=quiet)
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        sizes = summary.sizes
        typer.echo(f"{out}{' (dry run: nothing was written)' if dry_run else ''}")
        typer.echo(f"  {size(sizes.bytes_before)} -> {size(sizes.bytes_after)}")
        typer.echo(f"  parameters {count(sizes.parameters_before)} -> {count(sizes.parameters_after)}")
        typer.echo(f"  active     {count(sizes.active_before)} -> {count(sizes.active_after)}")
        typer.echo(
            f"  tensors    {summary.tensors_kept} copied, {summary.tensors_sliced} sliced, "
            f"{summary.tensors_dropped} dropped"
        )
        for warning in summary.warnings:
            typer.echo(f"warning: {warning}", err=True)
