"""``moeprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeprune.cli.options import Force, Json, ModelArgument, Mtp, Quiet, print_json

if TYPE_CHECKING:
    from moeprune.export.summary import ExportSummary


def export(
    model: ModelArgument,
    plan: Annotated[Path, typer.Option(help="A plan of `moeprune plan`.")],
    out: Annotated[Path, typer.Option(help="Folder to make; of a GGUF file, the file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and write nothing.")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file, such as `5GB` or `500MB`.", show_default="as in the source")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Files written at once.", show_default="processors, up to 4"),
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Hard link files that stay as they are (all of them, if only top-k changes). They take no room, but "
            "share their bytes with the source: what edits one in place changes both.",
        ),
    ] = False,
    keep_source: Annotated[
        bool,
        typer.Option(
            help="Keep what is downloaded from the Hub. If not, a file is deleted when it has been used, and the disk "
            "needs room for the result and `--jobs` files."
        ),
    ] = True,
    mtp: Annotated[
        Mtp | None,
        typer.Option(
            help="Multi-token prediction layers: pruned like the last layer, or left out.", show_default="as planned"
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the slimmed checkpoint by copying bytes; the model is never loaded.

    A model of the Hub is downloaded file by file, after everything has been checked. A killed export goes on where it
    was when the same command is run again.

    A GGUF file becomes a GGUF file, quantised as it is; the plan is that of the Hugging Face model it was made from.

    Example: `moeprune export demo --plan plan.json --out demo-48x6`
    """
    from moeprune.gguf.file import is_gguf

    if is_gguf(model):
        from moeprune.cli.gguf import export_file, refuse_options

        refuse_options(
            {"--max-shard-size": max_shard_size, "--jobs": jobs, "--link": link, "--no-keep-source": not keep_source}
        )
        export_file(model, plan=plan, out=out, mtp=mtp, dry_run=dry_run, force=force, quiet=quiet, as_json=as_json)
        return
    from moeprune.checkpoint.folder import read_config
    from moeprune.cli.advice import advice
    from moeprune.export.export import export_checkpoint
    from moeprune.plan.plan import Plan

    made = Plan.load(plan)
    made = made.model_copy(update={"mtp": mtp}) if mtp else made
    summary = export_checkpoint(
        model, plan=made, out=out, force=force, dry_run=dry_run, quiet=quiet, max_shard_size=max_shard_size, jobs=jobs,
        link=link, keep_source=keep_source,
    )  # fmt: skip
    if as_json:
        print_json(summary.to_json())
    elif not quiet:
        typer.echo(f"{out}{' (dry run: nothing was written)' if dry_run else ''}")
        typer.echo("\n".join(_lines(summary, dry_run=dry_run)))
        for line in advice(made, config=read_config(summary.source)):
            typer.echo(f"advice: {line}", err=True)


def _lines(summary: ExportSummary, *, dry_run: bool) -> list[str]:
    from moeprune.format import count, size

    sizes, files = summary.sizes, summary.files
    lines = [
        f"  {size(sizes.bytes_before)} -> {size(sizes.bytes_after)} in {len(files)} file(s)",
        f"  parameters {count(sizes.parameters_before)} -> {count(sizes.parameters_after)}",
        f"  active     {count(sizes.active_before)} -> {count(sizes.active_after)}",
        f"  tensors    {summary.tensors_kept} copied ({size(summary.bytes_kept)}), {summary.tensors_sliced} sliced "
        f"({size(summary.bytes_sliced)}), {summary.tensors_dropped} dropped; {size(summary.bytes_dropped)} left out",
    ]
    if dry_run:
        named = [f"{name} ({size(num_bytes)})" for name, num_bytes in files.items()]
        lines.append(f"  files      {', '.join(named[:2])}{f', ... {named[-1]}' if len(named) > 2 else ''}")
        if summary.to_download:
            lines.append(f"  download   {size(summary.to_download)}")
    if summary.finished:
        lines.append(f"  finished   {len(summary.finished)} of {len(files)} file(s), by an earlier attempt")
    if summary.not_read:
        lines.append(f"  left out   {', '.join(summary.not_read)}: beside the checkpoint, not named by its index")
    if summary.discarded:
        lines.append(
            f"  discarded  {size(summary.discarded)} of an earlier attempt with another plan, source or options"
        )
    return lines
