"""One rank of a calibration run in a process of its own: ``torchrun ... rank.py OUT [what goes wrong]``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.stats import Stats
from moeprune.errors import DataError
from tests.calibrate.reference import random_rows
from tests.models import build

FAMILY = "glm4_moe"


def calibrate(ranks: Ranks, keep_inputs: Path) -> Stats:
    """Two domains of three batches and two: of two ranks one has more than the other."""
    model = build(FAMILY)
    anatomy = derive_anatomy(model.config)
    rows = [random_rows("code", rows=5, padding=3), random_rows("math", rows=4, seed=1)]
    return collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="tiny", fingerprint="f" * 64), domains=rows, batch_size=2,
        quiet=True, statistics="full", keep_inputs=keep_inputs, ranks=ranks,
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
        stats = calibrate(ranks, out.with_suffix(".inputs"))
        if ranks.is_first:
            stats.save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
