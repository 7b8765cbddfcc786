"""What a criterion is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from moeprune.calibrate.quantities import LEVELS, QUANTITIES
from moeprune.errors import PlanError, StatsError
from moeprune.registry import Registry

if TYPE_CHECKING:
    from moeprune.calibrate.stats import Stats

Sums = Mapping[str, Float64[ndarray, "layers experts ..."]]


@runtime_checkable
class ScoreFunction(Protocol):
    """Statistics to saliency, (layers, experts), float64; larger means: keep."""

    def __call__(self, sums: Sums, *, seed: int) -> Float64[ndarray, "layers experts"]:
        """Score the experts.

        Args:
            sums: The arrays that the criterion needs, and perhaps others; domains already mixed.
            seed: For criteria that draw random numbers.
        """
        ...


@dataclass(frozen=True)
class Score:
    """A criterion.

    Attributes:
        name: As written in recipes.
        function: Computes it.
        formula: What it computes, with g the gate weight, f the expert's unweighted output, T the tokens routed to it.
        source: Paper that proposed or measured it.
        needs: The names of the quantities (:mod:`moeprune.calibrate.quantities`) that it reads.
    """

    name: str
    function: ScoreFunction
    formula: str
    source: str
    needs: tuple[str, ...]

    @property
    def level(self) -> str:
        """The lowest level of statistics that holds all it needs."""
        return max((QUANTITIES[name].level for name in self.needs), key=LEVELS.index, default=LEVELS[0])

    @property
    def by_domain(self) -> bool:
        """Whether it can be told for a domain or a mix: not where it needs what is summed over all text alone."""
        return all("domains" in QUANTITIES[name].axes for name in self.needs)

    def missing(self, stats: Stats) -> list[str]:
        """Names of the sums that the criterion needs and the statistics do not have."""
        return [name for name in self.needs if name not in stats.group(name)]

    def check(self, stats: Stats) -> None:
        """Refuse statistics without a sum that the criterion needs.

        Raises:
            StatsError: Naming the sum, the model type and the criteria that can be used instead.
        """
        missing = self.missing(stats)
        if missing:
            usable = [name for name in SCORES if not SCORES.get(name).missing(stats)]
            raise StatsError(
                f"the score {self.name!r} ({self.formula}) needs {' and '.join(missing)}, "
                f"{stats.why_absent(missing[0])} Use one of: {', '.join(usable)}."
            )

    def saliency(
        self, stats: Stats, *, domains: Mapping[str, float] | None = None, seed: int = 0
    ) -> Float64[ndarray, "layers experts"]:
        """Score the experts of a model.

        Args:
            stats: Its statistics.
            domains: Share of each domain in the mix (:meth:`moeprune.calibrate.stats.Stats.mixed`).
            seed: For criteria that draw random numbers.

        Raises:
            StatsError: If the statistics lack a sum that the criterion needs, a domain is unknown, or domains are given
                to a criterion that cannot be told by domain.
        """
        self.check(stats)
        if domains is not None and not self.by_domain:
            whole = next(name for name in self.needs if "domains" not in QUANTITIES[name].axes)
            raise StatsError(
                f"the score {self.name!r} needs {whole}, which is summed over all domains together: they cannot be "
                "mixed afterwards. Leave the shares of domains out, or calibrate on the mix itself."
            )
        return self.function(stats.mixed(domains, names=[*stats.experts, *self.needs]), seed=seed)


SCORES: Registry[Score] = Registry("score", PlanError)


def score(
    name: str, *, formula: str, source: str, needs: tuple[str, ...] = ("count",)
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register the decorated function as a criterion."""

    def add(function: ScoreFunction) -> ScoreFunction:
        SCORES.register(name, Score(name, function, formula, source, needs))
        return function

    return add


def mean_over_routed(total: Float64[ndarray, "layers experts"], sums: Sums) -> Float64[ndarray, "layers experts"]:
    """``total`` divided by the tokens routed to each expert; 0 for experts that were never chosen."""
    count = sums["count"]
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
