"""The batches of one rank, layer by layer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.schedule import Batch
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.lookahead import Schedule
from moeprune.calibrate.streaming.memory import check_hidden, check_layers
from moeprune.calibrate.streaming.replay import Result
from moeprune.calibrate.streaming.shelf import DiskShelf
from moeprune.calibrate.streaming.tree import leaves
from moeprune.errors import RoomError
from moeprune.interrupts import Interrupted, Signals

TRIED_TOKENS = 16
STREAMED = {"pass": "layer by layer"}


class Work:
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
        if folder is not None:
            stream.shelf = self._kept(partial, folder)

    def _kept(self, partial: Partial | None, folder: Path) -> DiskShelf:
        """The hidden states of an earlier run, if there are any to go on from."""
        saved = partial.load() if partial is not None else None
        if partial is None or saved is None or "layers" not in saved[1]:
            return DiskShelf(folder)
        stats, progress = saved
        shelf = DiskShelf(folder, progress["state"]["table"])
        if not shelf.is_complete and int(progress["layers"]) < int(progress["of"]):
            partial.say(f"{folder}: the hidden states after {progress['layers']} layers are gone; starting afresh.")
            return DiskShelf(folder)
        self._stream.restore(progress["state"])
        self._next, self._seconds, self.begun = int(progress["layers"]), float(progress["seconds"]), stats
        return shelf

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
        except torch.OutOfMemoryError as error:
            raise RoomError(
                f"the GPU has no memory left for batches of {self._batches[0].batch_size} rows beside the weights of "
                f"two layers. Give a smaller --batch-size or --length. {self._note()}".rstrip()
            ) from error
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
                    self._finished(position, stats, of=stop)

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

    def _finished(self, position: int, stats: Stats, *, of: int) -> None:
        self._next = position + 1
        if self._partial is not None:
            state = self._stream.state(position)
            self._partial.try_to_save(stats, {"layers": self._next, "of": of, "seconds": self._spent(), "state": state})
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
        dtype = str(self._stream.dtype).removeprefix("torch.")
        return {"dtype": dtype, "seconds": self._spent(), "tokens": tokens, **STREAMED}


def _most_kept(plan: Schedule) -> int:
    """The largest number of layers whose outputs are kept at the same time."""
    ends = range(len(plan.order))
    return max(sum(plan.last_reader[before] > end for before in range(end + 1)) for end in ends)
