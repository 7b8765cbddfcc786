"""``moeprune calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Device, Dtype, Force, Json, ModelArgument, Quiet, Seed, print_json, refuse_existing


def calibrate(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            help="[DOMAIN=]SOURCE[?split=..&subset=..&column=..&tokens=..]; a .jsonl, .json, .parquet or .txt file, a "
            "Hub data set, or `demo`. Repeat it for several domains."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Statistics file to write.")],
    column: Annotated[str | None, typer.Option(help="Column with text or chat messages.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Token budget of each domain.")] = 65_536,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens a row [default: 2048 or the context].")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward pass.")] = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run text through a model and record what its routers and experts do.

    One calibration serves every score, ratio and top-k. Domains are kept apart, so that plans can weigh them.

    Example: `moeprune calibrate demo --data demo --out stats.safetensors`
    """
    refuse_existing(out, force=force)
    from moeprune.anatomy.source import open_source
    from moeprune.calibrate.calibrate import calibrate as run_calibration
    from moeprune.calibrate.calibrate import read_calibration
    from moeprune.checkpoint.load import load_model, load_tokenizer
    from moeprune.cli.stats import describe
    from moeprune.data_spec import parse_data_spec

    source = open_source(model)
    rows = read_calibration(
        source,
        tokenizer=load_tokenizer(source.path),
        data=[parse_data_spec(text, column=column) for text in data],
        tokens=tokens,
        length=length or min(2048, source.anatomy.context or 2048),
        seed=seed,
    )
    loaded = load_model(source.path, dtype=dtype, device=device)
    stats = run_calibration(source, model=loaded, rows=rows, batch_size=batch_size, seed=seed, quiet=quiet)
    stats.save(out)
    facts = describe(stats)
    if as_json:
        print_json(facts)
    elif not quiet:
        typer.echo(
            f"{out}: {facts['tokens']:,} tokens of {len(stats.domains)} domain(s) in {stats.runs[0]['seconds']} s"
        )
        if facts["never_routed"]:
            typer.echo(f"{facts['never_routed']} of {facts['experts']} experts were never chosen.")
