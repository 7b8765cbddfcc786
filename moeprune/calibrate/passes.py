"""Run the model over calibration text and collect its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from moeprune.anatomy.anatomy import Anatomy
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.reservoir import Reservoir
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.schedule import Batch, schedule
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.stopping import EarlyStop
from moeprune.calibrate.until import Until, outcome, stop_early
from moeprune.errors import MoePruneError, RankError, RoomError
from moeprune.facts import ModelFacts
from moeprune.interrupts import Interrupted, Signals, interruptible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALONE = Ranks()


def collect_stats(
    model: PreTrainedModel,
    *,
    anatomy: Anatomy,
    facts: ModelFacts,
    domains: Sequence[Rows],
    batch_size: int = 8,
    quiet: bool = False,
    run: dict[str, Any] | None = None,
    statistics: str = "standard",
    keep_inputs: Path | None = None,
    ranks: Ranks = ALONE,
    partial: Partial | None = None,
    until: Until | None = None,
) -> Stats:
    """One forward pass over the text of every domain, observed.

    Args:
        model: The model in memory, in evaluation mode.
        anatomy: Where its experts are.
        facts: What the statistics say of the model.
        domains: The packed text, all of it on every rank.
        batch_size: Rows a forward pass.
        quiet: No progress bar.
        run: How the text was chosen, for the record.
        statistics: The level (:data:`moeprune.calibrate.quantities.LEVELS`).
        keep_inputs: File for the layer inputs of the sampled tokens; level ``full`` only.
        ranks: This process and those that run the rest of the text.
        partial: Where unfinished sums are kept and gone on from.
        until: When to stop before the text ends.

    Returns:
        The statistics of the whole text on rank 0; on other ranks those of their own part.

    Raises:
        StatsError: If a statistic is not finite, naming layer and expert.
        UnsupportedModelError: If the model's experts cannot be observed.
        Interrupted: At SIGINT or SIGTERM, after the sums were saved.
    """
    sample = TokenSample(domains) if statistics == "full" else None
    begun = partial.load() if partial is not None else None
    reservoir = None
    if keep_inputs is not None and sample is not None:
        hidden = int(anatomy.text_config.hidden_size)
        fresh = not any(ranks.gather(begun is not None))
        reservoir = ranks.once_then_all(
            lambda first: Reservoir(keep_inputs, facts, sample=sample, hidden=hidden, fresh=fresh and first)
        )
    observer = Observer.of(model, anatomy, statistics=statistics, sample=sample, reservoir=reservoir)
    work = _Pass(
        model=model, observer=observer, batches=schedule(domains, batch_size=batch_size), ranks=ranks, partial=partial,
        stats=begun[0] if begun else observer.zeros(facts, domains=[rows.domain for rows in domains]),
        progress=begun[1] if begun else {}, until=until, quiet=quiet,
    )  # fmt: skip
    if until is not None:
        until.check(work.stats)
    stop = EarlyStop(model, layers=[layer.name for layer in anatomy.layers])
    with torch.inference_mode(), interruptible() as signals, observer.observing(), stop.watching():
        work.run(stop, signals)
    observer.collect(work.stats)
    if reservoir is not None:
        reservoir.close()
    stats = ranks.reduce(work.stats)
    stats.runs = [{**(run or {}), **work.record(stats)}]
    stats.check("calibration")
    return stats


class _Pass:
    """One rank's part of the text.

    Attributes:
        stats: Its sums so far: those of whole batches, unless adding one failed. Some lie with the observer until the
            end.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        observer: Observer,
        batches: Sequence[Batch],
        ranks: Ranks,
        partial: Partial | None,
        stats: Stats,
        progress: dict[str, Any],
        until: Until | None,
        quiet: bool,
    ):
        self.stats = stats
        self._model, self._observer, self._ranks, self._partial, self._until = model, observer, ranks, partial, until
        self._batches = batches
        self._mine = ranks.share(len(batches))
        self._done = int(progress.get("batches", 0))
        self._is_whole = True
        self._seconds = float(progress.get("seconds", 0.0))
        self._begun = time.perf_counter()
        self._quiet = quiet or not ranks.is_first
        self._stopped: dict[str, Any] | None = None

    def run(self, stop: EarlyStop, signals: Signals) -> None:
        """Run what is left, and keep the sums if something ends it."""
        try:
            self._run(stop, signals)
        except BaseException as error:
            if isinstance(error, MoePruneError) and not isinstance(error, RankError):
                raise  # these sums are not what they should be, or can be had again at once
            note = ""
            with suppress(Interrupted), signals.held():  # a launcher ends its processes when another has failed
                note = self._kept()
            if isinstance(error, Interrupted):
                error.note = note
            if isinstance(error, torch.OutOfMemoryError):
                raise RoomError(
                    f"the GPU has no memory left for batches of {self._batches[0].batch_size} rows. Give a smaller "
                    f"--batch-size, or run layer by layer: --stream. {note}".rstrip()
                ) from error
            raise

    def _kept(self) -> str:
        """Save the sums because the run ends, and say so."""
        if self._partial is None or not self._done or not self._is_whole:
            return ""
        try:
            self._save(self._partial.save)
        except (RuntimeError, OSError) as error:  # of a device that failed, or a disk: what ends the run is told
            return f"Its sums could not be saved ({error})."
        return f"{self._partial.folder} holds {self._note()}; the same command goes on from there."

    def _run(self, stop: EarlyStop, signals: Signals) -> None:
        checks = self._until.boundaries(len(self._batches)) if self._until is not None else []
        if checks:
            # A rank that is ahead has passed checks that another, which goes on from older sums, must not repeat.
            ahead = max(self._ranks.gather(self._mine[self._done - 1] if self._done else -1))
            checks = [at for at in checks if at > ahead]
        with tqdm(unit="tok", unit_scale=True, desc="calibrate", disable=self._quiet) as bar:
            bar.total = sum(self._batches[at].num_tokens for at in self._mine)
            bar.update(sum(self._batches[at].num_tokens for at in self._mine[: self._done]))
            for end in [*checks, len(self._batches)]:
                while self._done < len(self._mine) and self._mine[self._done] < end:
                    self._one(self._batches[self._mine[self._done]], stop, signals, bar)
                if end < len(self._batches) and self._until is not None:
                    self._stopped = stop_early(self.stats, until=self._until, ranks=self._ranks)
                    if self._stopped is not None:
                        break
        if self._partial is not None and self._ranks.world > 1:
            self._save(self._partial.try_to_save)  # another rank may still fail

    def _one(self, batch: Batch, stop: EarlyStop, signals: Signals, bar: Any) -> None:
        bar.set_postfix_str(batch.domain, refresh=False)
        rows = batch.rows()
        self._observer.start(batch.domain)
        stop.run(lambda: run_decoder(self._model, rows, self._observer, numbers=batch.numbers))
        with signals.held():
            self._is_whole = False
            self._observer.finish(self.stats, domain=batch.domain, tokens=rows.num_tokens, hold=True)
            self._done += 1
            self._is_whole = True
        bar.update(rows.num_tokens)
        if self._partial is not None and self._partial.is_due:
            self._save(self._partial.try_to_save)

    def _save(self, save: Callable[[Stats, dict[str, Any]], None]) -> None:
        self._observer.collect(self.stats)
        save(self.stats, self._progress())

    def _progress(self) -> dict[str, Any]:
        rows = dict.fromkeys(self.stats.domains, 0)
        for at in self._mine[: self._done]:
            rows[self._batches[at].domain] += len(self._batches[at].numbers)
        return {"batches": self._done, "of": len(self._mine), "rows": rows, "seconds": self._spent()}

    def _note(self) -> str:
        return f"the sums of {self._done} of {len(self._mine)} batches" + (
            f" of rank {self._ranks.rank}" if self._ranks.world > 1 else ""
        )

    def _spent(self) -> float:
        return round(self._seconds + time.perf_counter() - self._begun, 2)

    def record(self, stats: Stats) -> dict[str, Any]:
        """What is said of the run in its statistics."""
        record = {
            "seconds": self._spent(),
            "tokens": {name: int(count) for name, count in zip(stats.domains, stats.tokens, strict=True)},
        }
        if self._ranks.world > 1:
            record["ranks"] = self._ranks.world
        if self._until is not None:
            record["stopped"] = self._stopped or outcome(stats, until=self._until)
        return record
