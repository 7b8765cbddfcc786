"""The ``moeprune`` program: one thin file a command. Nothing here loads torch until a command needs it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from moeprune import __version__
from moeprune.cli import calibrate, check, evaluate, export, inspect, ls, plan, run, stats, verify
from moeprune.errors import MoePruneError
from moeprune.interrupts import Interrupted

app = typer.Typer(
    name="moeprune",
    help="Fewer experts and fewer active experts for Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moeprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(stats.app, name="stats")
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command("ls")(ls.ls)


def main() -> None:
    """Run the program; errors that a user can mend end it with their text and exit status 1."""
    try:
        app()
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        raise SystemExit(stop.status) from None
    except MoePruneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
