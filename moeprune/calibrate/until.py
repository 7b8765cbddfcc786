"""Stop when more text would not change the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeprune.calibrate.ranks import Ranks
from moeprune.calibrate.stats import Stats

CHECKS = 20


@dataclass(frozen=True)
class Until:
    """When to stop before the text ends.

    Attributes:
        reliability: Split-half reliability that is enough, 0 to 1.
        score: The score whose reliability it is.
    """

    reliability: float
    score: str = "reap"

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
    from moeprune.calibrate.reliability import reliability

    whole = ranks.reduce(stats)

    def decide() -> dict[str, Any] | None:
        reached = reliability(whole, score=until.score)
        if not reached >= until.reliability:
            return None
        return {"why": "stable", "score": until.score, "reliability": reached, "wanted": until.reliability}

    return ranks.once(decide)
