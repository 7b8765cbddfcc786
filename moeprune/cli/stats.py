"""``moeprune stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeprune.cli.options import Force, Json, Quiet, print_json, refuse_existing

if TYPE_CHECKING:
    from moeprune.calibrate.stats import Stats

app = typer.Typer(help="Look at statistics files, compare them and add them together.", no_args_is_help=True)

Score = Annotated[str, typer.Option(help="Score by which experts are ranked (`moeprune ls scores`).")]
Keep = Annotated[float, typer.Option(help="Share of experts that count as kept.", min=0.0, max=1.0)]


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Statistics of the same model.")],
    out: Annotated[Path, typer.Option(help="Statistics file to write.")],
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Add statistics of several runs; the result equals one run over all their texts.

    Text that two of them saw would count twice and is refused. Of `--stats full` it holds the samples of all.

    Example: `moeprune stats merge code.safetensors math.safetensors --out both.safetensors`
    """
    refuse_existing(out, force=force, reads=files)
    from moeprune.calibrate.stats import Stats, merge_stats

    merged = merge_stats([Stats.load(file) for file in files])
    merged.save(out)
    if not quiet:
        typer.echo(f"{out}: {int(merged.tokens.sum()):,} tokens of {', '.join(merged.domains)}")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A statistics file.")],
    score: Score = "reap",
    keep: Keep = 0.5,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens by layer and expert into this .png file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --plot.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a statistics file saw: tokens an expert, experts to beware of, how well domains and halves agree.

    Example: `moeprune stats show stats.safetensors --plot coverage.png`
    """
    from moeprune.calibrate.stats import Stats
    from moeprune.cli.stats_text import lines
    from moeprune.errors import MoePruneError

    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise MoePruneError(f"--plot {plot}: expected a name that ends in .png.")
        refuse_existing(plot, force=force, reads=[file])
    stats = Stats.load(file)
    facts = describe(stats, score=score, keep=keep)
    if plot is not None:
        from moeprune.report.plots.coverage import plot_coverage

        plot_coverage(stats, plot)
    if as_json:
        print_json(facts)
        return
    for line in lines(facts):
        typer.echo(line)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A statistics file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same model.")],
    score: Score = "reap",
    keep: Keep = 0.5,
    as_json: Json = False,
) -> None:
    """Say how two statistics of one model differ: which experts one would keep and the other would not.

    Example: `moeprune stats diff short.safetensors long.safetensors`
    """
    from moeprune.calibrate.coverage import difference
    from moeprune.calibrate.stats import Stats
    from moeprune.cli.stats_text import diff_lines

    facts = difference(Stats.load(first), Stats.load(second), score=score, keep=keep)
    if as_json:
        print_json(facts)
        return
    for line in diff_lines(facts, names=(str(first), str(second))):
        typer.echo(line)


def describe(stats: Stats, *, score: str = "reap", keep: float = 0.5) -> dict[str, Any]:
    """Facts about a statistics file as plain JSON.

    Args:
        stats: The statistics.
        score: Name of the criterion by which domains are compared.
        keep: Share of experts to keep, for overlaps.
    """
    from dataclasses import asdict

    from moeprune.calibrate.coverage import STARVED_TOKENS, agreement, domain_coverage, layer_coverage, super_experts
    from moeprune.calibrate.reliability import NO_TEXT, split_half, usable_scores
    from moeprune.score import SCORES

    counts = stats.experts["count"].sum(axis=0)
    criterion = SCORES.get(score)
    found = super_experts(stats)
    layers = layer_coverage(stats)
    known = usable_scores(stats)
    halves = [split_half(stats, score=name, keep=keep) for name in known]
    usable = criterion.by_domain and not criterion.missing(stats)
    return {
        "model": stats.model.name,
        "statistics": stats.statistics,
        "tokens": int(stats.tokens.sum()),
        "domains": {name: int(n) for name, n in zip(stats.domains, stats.tokens, strict=True)},
        "experts": int(counts.size),
        "never_routed": int((counts == 0).sum()),
        "starved": sum(len(layer.starved) for layer in layers),
        "starved_below": STARVED_TOKENS,
        "unseen_layers": list(stats.unseen_layers),
        "absent": list(stats.absent),
        "why_absent": stats.why_absent(stats.absent[0]) if stats.absent else None,
        "runs": stats.runs,
        "coverage": [asdict(domain) for domain in domain_coverage(stats)],
        "layers": [asdict(layer) for layer in layers],
        "super_experts": None if found is None else [asdict(expert) for expert in found],
        "score": score,
        "keep": keep,
        "agreement": [asdict(pair) for pair in agreement(stats, score=score, keep=keep)] if usable else None,
        "reliability": [
            {"score": half.score, "correlation": half.mean, "overlap": half.mean_overlap, "layers": len(half.layers)}
            for half in halves
        ],
        "reliability_unknown": [
            name for name in SCORES if name not in {*known, *NO_TEXT} and not SCORES.get(name).missing(stats)
        ],
    }
