"""``moeprune verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Device, Json, Quiet, print_json


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint or GGUF file of `moeprune export`.")],
    against: Annotated[
        str | None,
        typer.Option(help="The source: a folder, a Hub id or `demo` [default: as recorded in moeprune.json]."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan [default: as recorded in moeprune.json].")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Reload a pruned checkpoint strictly and compare it with its source, byte for byte and logit for logit.

    Exit status 1 if anything differs.

    Example: `moeprune verify demo-48x6 --against demo --plan plan.json`
    """
    from moeprune.gguf.file import is_gguf
    from moeprune.plan.plan import Plan

    loaded = Plan.load(plan) if plan else None
    if is_gguf(folder):
        from moeprune.gguf.verify import verify_gguf

        checks = verify_gguf(folder, against=against, plan=loaded, quiet=quiet)
    else:
        from moeprune.export.verify import verify_checkpoint

        checks = verify_checkpoint(folder, against=against, plan=loaded, device=device, quiet=quiet)
    if as_json:
        print_json([check.to_json() for check in checks])
    elif not quiet:
        for check in checks:
            typer.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    failed = [check for check in checks if not check.passed]
    if failed:
        typer.echo(f"error: {folder}: {failed[0].name}: {failed[0].detail}", err=True)
        raise typer.Exit(1)
