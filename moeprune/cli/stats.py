"""``moeprune stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune.cli.options import Force, Json, Quiet, print_json, refuse_existing

if TYPE_CHECKING:
    from moeprune.calibrate.stats import Stats

app = typer.Typer(help="Look at statistics files and add them together.", no_args_is_help=True)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Statistics of the same model.")],
    out: Annotated[Path, typer.Option(help="Statistics file to write.")],
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Add statistics of several runs; the result equals one run over all their texts.

    Example: `moeprune stats merge code.safetensors math.safetensors --out both.safetensors`
    """
    refuse_existing(out, force=force)
    from moeprune.calibrate.stats import Stats, merge_stats

    merged = merge_stats([Stats.load(file) for file in files])
    merged.save(out)
    if not quiet:
        typer.echo(f"{out}: {int(merged.tokens.sum()):,} tokens of {', '.join(merged.domains)}")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A statistics file.")],
    as_json: Json = False,
) -> None:
    """Say what a statistics file saw: tokens by domain, load entropy by layer, experts that were never chosen.

    Example: `moeprune stats show stats.safetensors`
    """
    from moeprune.calibrate.stats import Stats

    facts = describe(Stats.load(file))
    if as_json:
        print_json(facts)
        return
    typer.echo(
        f"{facts['model']}: {facts['tokens']:,} tokens, {facts['never_routed']} of {facts['experts']} experts "
        "never chosen"
    )
    if facts["absent"]:
        typer.echo(f"  this model gives no {', no '.join(facts['absent'])}")
    for name, tokens in facts["domains"].items():
        typer.echo(f"  {name:<20} {tokens:>12,} tokens")
    typer.echo("  layer                load entropy (1 = even)   busiest / mean   never chosen")
    for layer in facts["layers"]:
        typer.echo(
            f"  {layer['layer']:<20} {layer['load_entropy']:>12.3f} {layer['busiest']:>20.2f} "
            f"{layer['never_routed']:>14}"
        )


def describe(stats: Stats) -> dict[str, Any]:
    """Facts about a statistics file as plain JSON."""
    import numpy as np

    from moeprune.calibrate.load import load_entropy

    counts = stats.experts["count"].sum(axis=0)
    entropy = load_entropy(counts)
    return {
        "model": stats.model.name,
        "tokens": int(stats.tokens.sum()),
        "domains": {name: int(n) for name, n in zip(stats.domains, stats.tokens, strict=True)},
        "experts": int(counts.size),
        "never_routed": int((counts == 0).sum()),
        "absent": list(stats.absent),
        "layers": [
            {
                "layer": name,
                "load_entropy": float(entropy[i]),
                "busiest": float(counts[i].max() / np.maximum(counts[i].mean(), 1e-12)),
                "never_routed": int((counts[i] == 0).sum()),
            }
            for i, name in enumerate(stats.model.layers)
        ],
    }
