"""Stop when more text would not change the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.reliability import split_half
from moeprune.calibrate.stats import Stats

CHECKS = 20
STABLE = "stable"


@dataclass(frozen=True)
class Until:
    """When to stop before the text ends.

    The mean over the layers decides, and not the lowest: in a layer whose experts matter about alike no amount of text
    ranks them reliably, and the choice among them matters least; such a layer would keep a run from ever ending. The
    lowest is said beside the mean, for whoever wants to look at it.

    Attributes:
        reliability: Split-half reliability that is enough, 0 to 1, mean over the layers.
        score: The score whose reliability it is.
    """

    reliability: float
    score: str = "reap"

    def check(self, stats: Stats) -> None:
        """Raise :class:`moeprune.errors.StatsError` if these statistics will never tell the score's reliability."""
        split_half(stats, score=self.score)

    def boundaries(self, batches: int) -> list[int]:
        """After which batches of the whole text to look: every twentieth of it, whatever the number of ranks."""
        every = max(1, -(-batches // CHECKS))
        return list(range(every, batches, every))


def stop_early(stats: Stats, *, until: Until, ranks: Ranks) -> dict[str, Any] | None:
    """Why to stop now, for the record, or None to go on. All ranks call it at the same place and get the same answer.

    Args:
        stats: This rank's sums.
        until: What is enough.
        ranks: The ranks.
    """
    whole = ranks.reduce(replace(stats, layers={}, more={}))  # what no reliability needs can be large
    return ranks.once(lambda: record if (record := outcome(whole, until=until))["why"] == STABLE else None)


def outcome(stats: Stats, *, until: Until) -> dict[str, Any]:
    """What is said of the end of a run in its statistics; ``lowest`` is of the layer that is ranked least reliably."""
    halves = split_half(stats, score=until.score)
    why = STABLE if halves.mean >= until.reliability else "end of the text"
    record = {"why": why, "score": until.score, "reliability": halves.mean, "wanted": until.reliability}
    if not halves.layers:
        return record
    lowest, layer = min(zip(halves.whole, halves.layers, strict=True))
    return record | {"lowest": {"layer": layer, "reliability": lowest}}
