"""Calibrate layer by layer: all text through one layer, then through the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moeprune.anatomy.source import Source
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.passes import ALONE
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.reservoir import Reservoir
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.schedule import Batch, schedule
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.lookahead import Schedule
from moeprune.calibrate.streaming.memory import check_hidden, check_layers
from moeprune.calibrate.streaming.replay import Result
from moeprune.calibrate.streaming.shelf import DiskShelf
from moeprune.calibrate.streaming.tree import leaves
from moeprune.checkpoint.load import choose_device
from moeprune.interrupts import Interrupted, Signals, interruptible

TRIED_TOKENS = 16
STREAMED = {"pass": "layer by layer"}


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
    work = _Layers(
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


class _Layers:
    """One rank's batches through all layers up to the last one with experts.

    Attributes:
        begun: Sums of layers that an earlier run finished; None if there are none to go on from.
    """

    def __init__(
        self,
        stream: LayerStream,
        *,
        batches: Sequence[Batch],
        partial: Partial | None,
        folder: Path | None,
        quiet: bool,
    ):
        self._stream, self._partial, self._folder, self._quiet = stream, partial, folder, quiet
        names = list(dict.fromkeys(batch.domain for batch in batches))
        # One domain after the other, because a layer's sums are those of one domain.
        self._batches = sorted(batches, key=lambda batch: names.index(batch.domain))
        self._next, self._seconds, self._start = 0, 0.0, time.perf_counter()
        self.begun: Stats | None = None
        saved = partial.load() if partial is not None and folder is not None else None
        if saved is not None and "layers" in saved[1]:
            self.begun, progress = saved
            self._next, self._seconds = int(progress["layers"]), float(progress["seconds"])
            stream.restore(progress["state"])
        if folder is not None:
            stream.shelf = DiskShelf(folder, saved[1]["state"]["table"] if self.begun is not None and saved else None)

    def run(self, observer: Observer, stats: Stats, signals: Signals) -> None:
        """Run what is left, and say how to go on if something ends it."""
        if not self._batches:
            return
        finished = False
        try:
            self._run(observer, stats, signals)
            finished = True
        except Interrupted as error:
            error.note = self._note()
            raise
        finally:
            if self._folder is not None and (finished or self._partial is None):
                shutil.rmtree(self._folder)

    def _run(self, observer: Observer, stats: Stats, signals: Signals) -> None:
        forwards = [self._forward(batch, observer) for batch in self._batches]
        if self._stream.schedule is None:
            self._check_room(self._stream.plan(self._tried()))
        plan = self._stream.schedule
        assert plan is not None
        with_experts = [position for position, path in enumerate(plan.order) if path in self._stream.holders]
        tokens = sum(batch.num_tokens for batch in self._batches)
        stop = with_experts[-1] + 1
        with (
            observer.observing(),
            tqdm(total=stop * tokens, unit="tok", unit_scale=True, desc="calibrate", disable=self._quiet) as bar,
        ):
            bar.update(self._next * tokens)
            for position in range(self._next, stop):
                bar.set_postfix_str(plan.order[position], refresh=False)
                self._one(position, observer, stats, forwards, bar, keep=position + 1 < stop)
                with signals.held():
                    self._finished(position, stats)

    def _one(self, position: int, observer: Observer, stats: Stats, forwards: Any, bar: Any, *, keep: bool) -> None:
        """Run a layer on all batches and add its sums, domain by domain."""
        assert self._stream.schedule is not None
        path = self._stream.schedule.order[position]
        observed = path in self._stream.holders
        domain: str | None = None
        for at in self._stream.advance(position, forwards, keep=keep):
            batch = self._batches[at]
            if batch.domain != domain:
                if domain is not None and observed:
                    observer.finish(stats, domain=domain, tokens=self._tokens(path, domain))
                domain = batch.domain
                observer.start(domain)
            bar.update(batch.num_tokens)
        if observed and domain is not None:
            observer.finish(stats, domain=domain, tokens=self._tokens(path, domain))

    def _tokens(self, path: str, domain: str) -> int:
        """How many tokens to count for a domain with a layer: those that it is the first to see."""
        assert self._stream.schedule is not None
        stack = path.rpartition(".")[0]
        observed = (one for one in self._stream.schedule.order if one in self._stream.holders)
        if path != next(one for one in observed if one.rpartition(".")[0] == stack):
            return 0
        return sum(self._seen_by(stack, batch.rows()) for batch in self._batches if batch.domain == domain)

    def _seen_by(self, stack: str, rows: Rows) -> int:
        model: Any = self._stream.model
        if not model.config.is_encoder_decoder:
            return rows.num_tokens
        encoder = model.get_encoder()
        half = rows.ids.shape[1] // 2
        of_encoder = any(module is model.get_submodule(stack) for module in encoder.modules())
        return int((rows.mask[:, :half] if of_encoder else rows.mask[:, half:]).sum())

    def _forward(self, batch: Batch, observer: Observer) -> Any:
        return lambda: run_decoder(self._stream.model, batch.rows(), observer, numbers=batch.numbers)

    def _tried(self) -> Any:
        rows = self._batches[0].rows()
        few = Rows(rows.domain, rows.ids[:1, :TRIED_TOKENS], torch.ones_like(rows.mask[:1, :TRIED_TOKENS]))
        return bound(run_decoder, self._stream.model, few)

    def _check_room(self, tried: Result) -> None:
        stream = self._stream
        assert stream.schedule is not None
        sizes = {path: stream.weights.num_bytes(path) for path in stream.schedule.order}
        check_layers(max(sizes.values()), held=sizes[stream.schedule.order[0]], device=stream.device)
        per_token = sum(tensor.nbytes for tensor in leaves(tried.output)) / min(
            TRIED_TOKENS, self._batches[0].rows().ids.shape[1]
        )
        tokens = sum(batch.rows().ids.numel() for batch in self._batches)
        kept = _most_kept(stream.schedule) + (self._folder is not None)
        check_hidden(int(per_token * tokens * kept), folder=self._folder)

    def _finished(self, position: int, stats: Stats) -> None:
        self._next = position + 1
        if self._partial is not None:
            self._partial.save(stats, {"layers": self._next, "seconds": self._spent(), "state": self._stream.state()})
        self._stream.tidy(position)

    def _note(self) -> str:
        if self._folder is None:
            return "Hidden states were in memory, so that the next run starts again; --offload-hidden keeps them."
        if self._partial is None or not self._next:
            return ""
        return f"{self._folder} holds the text after {self._next} layers; the same command goes on from there."

    def _spent(self) -> float:
        return round(self._seconds + time.perf_counter() - self._start, 2)

    def record(self, stats: Stats) -> dict[str, Any]:
        """What is said of the run in its statistics."""
        tokens = {name: int(count) for name, count in zip(stats.domains, stats.tokens, strict=True)}
        return {"seconds": self._spent(), "tokens": tokens, **STREAMED}


def _most_kept(plan: Schedule) -> int:
    """The largest number of layers whose outputs are kept at the same time."""
    ends = range(len(plan.order))
    return max(sum(plan.last_reader[before] > end for before in range(end + 1)) for end in ends)
