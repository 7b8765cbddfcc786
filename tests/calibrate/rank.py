"""One rank of a calibration run in a process of its own: ``torchrun ... rank.py OUT [what goes wrong]``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from transformers import PreTrainedModel

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.stats import Stats
from moeprune.errors import DataError
from tests.calibrate.reference import experts_of, random_rows
from tests.models import build

FAMILY = "glm4_moe"


def kill_at(model: PreTrainedModel, batch: int) -> None:
    """Let the process be killed in the middle of a batch, counted from 1, so that nothing of it can be saved."""
    calls = []

    def hook(*_: object) -> None:
        calls.append(None)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGKILL)

    model.get_submodule(experts_of(model)[0]).register_forward_pre_hook(hook)


def calibrate(ranks: Ranks, keep_inputs: Path, *, folder: Path | None = None, killed_at: int | None = None) -> Stats:
    """Two domains of three batches and two: of two ranks one has more than the other."""
    model = build(FAMILY)
    if killed_at is not None:
        kill_at(model, killed_at)
    anatomy = derive_anatomy(model.config)
    rows = [random_rows("code", rows=5, padding=3), random_rows("math", rows=4, seed=1)]
    return collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="tiny", fingerprint="f" * 64), domains=rows, batch_size=2,
        quiet=True, statistics="full", keep_inputs=keep_inputs, ranks=ranks,
        partial=None if folder is None else Partial(folder, {}, rank=ranks.rank, world=ranks.world, every=0),
    )  # fmt: skip


def main(out: Path, what: str = "") -> None:
    ranks = Ranks.current("cpu")
    with ranks.together():
        if what == "raise" and ranks.rank == 1:
            raise DataError("this rank's text is unreadable")
        if what == "die" and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise" and ranks.rank == 0:
            ranks.wait()  # in which no signal is handled
            time.sleep(600)
        killed = {"killed-0": 0, "killed-1": 1}.get(what) == ranks.rank
        stats = calibrate(
            ranks, out.with_suffix(".inputs"), folder=out.with_suffix(".partial") if what else None,
            killed_at=2 if killed else None,
        )  # fmt: skip
        if ranks.is_first:
            stats.save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
