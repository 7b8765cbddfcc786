"""The options of ``moeprune calibrate``, in the groups in which its help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TEXT, SUMS, RUNNING = "Text", "Statistics", "Running"

Out = Annotated[Path, typer.Option(help="Statistics file to write; unfinished sums are kept in OUT.partial.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be run: text, memory, sizes.")]

Data = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=TEXT,
        help="[DOMAIN=]SOURCE[?split=..&subset=..&column=..&tokens=..]; a .jsonl, .json, .csv, .parquet "
        "or .txt file, a pattern or folder of such, a Hub data set, a mix (`moeprune ls data`), or `demo`. Repeat it "
        "for several domains.",
    ),
]
Column = Annotated[str | None, typer.Option(rich_help_panel=TEXT, help="Column with text or chat messages.")]
Tokens = Annotated[int, typer.Option(rich_help_panel=TEXT, min=1, help="Token budget of each domain.")]
Length = Annotated[
    int | None, typer.Option(rich_help_panel=TEXT, min=2, help="Tokens a row [default: 2048 or the context].")
]
Pack = Annotated[
    str,
    typer.Option(
        rich_help_panel=TEXT,
        help="How documents become rows: `isolate` (several that do not see each other), `pad` (one a row), `concat` "
        "(one long text, cut) or `auto` (the first that the model can).",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", rich_help_panel=TEXT, help="Tokenise anew, and do not keep it for the next run."),
]
SelfGenerate = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=TEXT,
        metavar="PROMPTS",
        help="Calibrate on the model's own answers to these prompts (given as --data is); they are kept in "
        "OUT.answers.jsonl.",
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(rich_help_panel=TEXT, min=1, help="Longest answer of --self-generate, in tokens.")
]

Level = Annotated[
    str,
    typer.Option(
        "--stats",
        rich_help_panel=SUMS,
        help="What is summed: `standard` (enough for all scores but `mone`), `merge` (also pairs of experts and mean "
        "outputs) or `full` (also all experts on a sample of tokens).",
    ),
]
KeepInputs = Annotated[
    Path | None,
    typer.Option(rich_help_panel=SUMS, metavar="FILE", help="With --stats full: keep layer inputs of the sample."),
]
UntilStable = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SUMS, help="Stop as soon as the split-half reliability of a score is this high, such as 0.98."
    ),
]
StableScore = Annotated[str, typer.Option(rich_help_panel=SUMS, help="That score.")]

BatchSize = Annotated[int, typer.Option(rich_help_panel=RUNNING, min=1, help="Rows a forward pass.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=RUNNING,
        help="Spread the model over all GPUs of this process: `auto`, `balanced`, `balanced_low_0` or `sequential`.",
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        rich_help_panel=RUNNING,
        help="Layer by layer, or the whole model in memory [default: as memory allows].",
    ),
]
OffloadHidden = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=RUNNING,
        metavar="DIR",
        help="Layer by layer: keep hidden states there instead of in memory, and go on from the last finished layer.",
    ),
]
SaveEvery = Annotated[
    float, typer.Option(rich_help_panel=RUNNING, min=0, help="Minutes between two saves of unfinished sums.")
]
