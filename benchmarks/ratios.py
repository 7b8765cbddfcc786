"""Do several things in turn and compare each with the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[], None]


def in_turn(works: Mapping[str, Work], *, rounds: int, clock: Callable[[Work], float]) -> dict[str, list[float]]:
    """Seconds of each work, forwards in one round and backwards in the next; all of it once before, unmeasured."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else reversed(works):
            seconds[name].append(clock(works[name]))
    return seconds


def ratios(seconds: Mapping[str, list[float]], *, over: str) -> dict[str, Any]:
    """Median seconds of each, and the ratios to ``over`` of the same round: their median, and all of them sorted."""
    found: dict[str, Any] = {"seconds": {name: round(statistics.median(own), 3) for name, own in seconds.items()}}
    for name, own in seconds.items():
        if name != over:
            each = sorted(mine / base for mine, base in zip(own, seconds[over], strict=True))
            found[name] = {
                "median_ratio": round(statistics.median(each), 3), "ratios": [round(ratio, 3) for ratio in each]
            }  # fmt: skip
    return found
