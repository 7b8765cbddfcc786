"""Calibrate layer by layer: all text through one layer, then through the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeprune.anatomy.source import Source
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.passes import ALONE
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.reservoir import Reservoir
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.schedule import schedule
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.work import STREAMED, Work
from moeprune.checkpoint.load import choose_device
from moeprune.interrupts import interruptible


def stream_stats(
    source: Source,
    *,
    rows: Sequence[Rows],
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    run: dict[str, Any] | None = None,
    statistics: str = "standard",
    keep_inputs: Path | None = None,
    ranks: Ranks = ALONE,
    partial: Partial | None = None,
    offload_hidden: Path | None = None,
) -> Stats:
    """The statistics of :func:`moeprune.calibrate.passes.collect_stats` with two layers in memory instead of a model.

    Args:
        source: The checkpoint. A quantised one is dequantised layer by layer.
        rows: The packed text, all of it on every rank.
        batch_size: Rows that are run at a time.
        dtype: As what weights are loaded; ``auto`` keeps the stored dtype.
        device: Where layers run; ignored where ``ranks`` says it.
        quiet: No progress bar.
        run: How the text was chosen, for the record.
        statistics: The level (:data:`moeprune.calibrate.quantities.LEVELS`).
        keep_inputs: File for the layer inputs of the sampled tokens; level ``full`` only.
        ranks: This process and those that run the rest of the text.
        partial: Where the sums of finished layers are kept and gone on from; needs ``offload_hidden``.
        offload_hidden: Folder for hidden states; without it they stay in memory, and a killed run starts again.

    Returns:
        The statistics of the whole text on rank 0; on other ranks those of their own part.

    Raises:
        RoomError: If two layers, or the hidden states, do not fit.
        StatsError: If a statistic is not finite, naming layer and expert.
        UnsupportedModelError: If the model's experts cannot be observed, or it cannot be streamed.
        Interrupted: At SIGINT or SIGTERM.
    """
    place = torch.device(ranks.device if ranks.world > 1 else choose_device(device))
    stream = LayerStream(source, dtype=dtype, device=place)
    sample = TokenSample(rows) if statistics == "full" else None
    batches = schedule(rows, batch_size=batch_size)
    work = Work(
        stream,
        batches=[batches[at] for at in ranks.share(len(batches))],
        partial=replace(partial, inputs={**partial.inputs, **STREAMED}) if partial and offload_hidden else None,
        folder=offload_hidden / f"rank-{ranks.rank}-of-{ranks.world}" if offload_hidden else None,
        quiet=quiet or not ranks.is_first,
    )
    reservoir = None
    if keep_inputs is not None and sample is not None:
        hidden = int(source.anatomy.text_config.hidden_size)
        fresh = not any(ranks.gather(work.begun is not None))
        reservoir = ranks.once_then_all(
            lambda first: Reservoir(keep_inputs, source.facts, sample=sample, hidden=hidden, fresh=fresh and first)
        )
    observer = Observer.of(stream.model, source.anatomy, statistics=statistics, sample=sample, reservoir=reservoir)
    stats = work.begun or observer.zeros(source.facts, domains=[part.domain for part in rows])
    with torch.inference_mode(), interruptible() as signals, stream.open():
        work.run(observer, stats, signals)
    if reservoir is not None:
        reservoir.close()
    stats = ranks.reduce(stats)
    stats.runs = [{**(run or {}), **work.record(stats), **({"ranks": ranks.world} if ranks.world > 1 else {})}]
    stats.check("calibration")
    return stats
