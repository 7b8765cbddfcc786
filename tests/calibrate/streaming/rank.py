"""One rank of a streamed run in a process of its own: ``torchrun ... rank.py MODEL OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from moeprune.anatomy.source import open_source
from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.streaming.passes import stream_stats
from tests.calibrate.streaming.both import text


def main(model: Path, out: Path) -> None:
    ranks = Ranks.current("cpu")
    with ranks.together():
        stats = stream_stats(
            open_source(model), rows=text(), batch_size=2, quiet=True, statistics="merge", ranks=ranks,
            offload_hidden=out.with_name("hidden"),
        )  # fmt: skip
        if ranks.is_first:
            stats.save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
