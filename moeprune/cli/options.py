"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id (owner/name), or `demo`.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no remarks.")]
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
Dtype = Annotated[str, typer.Option(help="`auto` (as stored), `float32`, `bfloat16` or `float16`.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random here.")]


def print_json(value: Any) -> None:
    """Print facts for other programs."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def refuse_existing(path: Path, *, force: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse to overwrite a file that was not meant to be, and a place that nothing can be written to.

    Args:
        path: The file that is to be written.
        force: Whether it may be replaced.
        reads: The files that the command reads: they may not.

    Raises:
        MoePruneError: Which of these it is.
    """
    from moeprune.errors import MoePruneError
    from moeprune.files import why_not_writable

    if path.is_dir():
        raise MoePruneError(f"{path}: is a folder. Give the name of a file.")
    if path.exists() and any(other.exists() and path.samefile(other) for other in reads):
        raise MoePruneError(f"{path}: is what this command reads. Choose another name.")
    if path.exists() and not force:
        raise MoePruneError(f"{path}: exists. Choose another name, or replace it with --force.")
    if why := why_not_writable(path):
        raise MoePruneError(f"{path}: cannot be written there ({why}). Choose another place.")


Mtp = Literal["prune", "drop"]
