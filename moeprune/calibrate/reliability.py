"""Enough text? How well each score repeats itself on the other half of the calibration text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from moeprune.calibrate.quantities import QUANTITIES
from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError
from moeprune.score import SCORES

NO_TEXT = frozenset({"random"})
"""Scores that do not look at the text repeat whatever it is."""


@dataclass(frozen=True)
class Reliability:
    """How well a score agrees between the even and the odd rows of the text.

    Attributes:
        score: Its name.
        keep: Experts of each layer that count as kept.
        layers: Layers that saw tokens in both halves.
        correlation: Spearman's rank correlation of the two halves' saliencies, of each of those layers.
        whole: The same of the whole text with as much again, predicted from ``correlation`` by the formula of Spearman
            and Brown, 2 r / (1 + r), which applies to correlations: a half is half as long as what is asked about.
        overlap: Share of kept experts that both halves keep, of each layer; not corrected, because the formula does
            not apply to it. It understates the whole text.
    """

    score: str
    keep: int
    layers: tuple[str, ...]
    correlation: tuple[float, ...]
    whole: tuple[float, ...]
    overlap: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of ``whole`` over the layers; 0 where no layer saw tokens in both halves."""
        return float(np.mean(self.whole)) if self.whole else 0.0

    @property
    def mean_overlap(self) -> float:
        """Mean of ``overlap`` over the layers; 0 where no layer saw tokens in both halves."""
        return float(np.mean(self.overlap)) if self.overlap else 0.0


def split_half(
    stats: Stats, *, score: str, keep: float = 0.5, domains: Mapping[str, float] | None = None
) -> Reliability:
    """Compare the saliencies of the two halves of the text.

    Args:
        stats: Statistics that tell even from odd rows.
        score: Name of the criterion.
        keep: Share of experts to keep, for ``overlap``.
        domains: Share of each domain in the mix (:meth:`moeprune.calibrate.stats.Stats.mixed`).

    Raises:
        StatsError: If rows are not told apart, the score does not look at text, or needs what is not kept by half.
        PlanError: If the score is unknown.
    """
    criterion = SCORES.get(score)
    if score in NO_TEXT:
        raise StatsError(f"the score {score!r} does not look at the text, so that no text makes it more reliable.")
    if whole := [name for name in criterion.needs if not QUANTITIES[name].halved]:
        raise StatsError(
            f"the score {score!r} needs {whole[0]}, which is not kept for the even and the odd rows apart, so that its "
            f"reliability cannot be told. Use one of: {', '.join(usable_scores(stats))}."
        )
    criterion.check(stats)
    halves = [stats.half(0), stats.half(1)]
    kept = max(1, round(keep * stats.model.num_experts))
    if not all(half.tokens.any() for half in halves):
        return Reliability(score, kept, (), (), (), ())
    first, second = (criterion.saliency(half, domains=domains) for half in halves)
    seen = np.all([half.experts["count"].sum(axis=(0, 2)) > 0 for half in halves], axis=0)
    at = [index for index in np.flatnonzero(seen) if not _is_constant(first[index]) and not _is_constant(second[index])]
    rho = [rank_correlation(first[index], second[index]) for index in at]
    groups = stats.model.routing.n_group
    return Reliability(
        score=score,
        keep=kept,
        layers=tuple(stats.model.layers[index] for index in at),
        correlation=tuple(rho),
        whole=tuple(spearman_brown(r) for r in rho),
        overlap=tuple(overlap(first[index], second[index], keep=kept, n_group=groups) for index in at),
    )


def reliability(stats: Stats, *, score: str, keep: float = 0.5) -> float:
    """The one number by which a run can stop: :attr:`Reliability.mean`, 1 where more text changes no rank."""
    return split_half(stats, score=score, keep=keep).mean


def usable_scores(stats: Stats) -> tuple[str, ...]:
    """Names of the scores whose reliability these statistics tell."""
    return tuple(
        name for name in SCORES if name not in NO_TEXT and all(sum_ in stats.halves for sum_ in SCORES.get(name).needs)
    )


def spearman_brown(r: float) -> float:
    """Reliability of a text twice as long (Spearman 1910; Brown 1910); never more than 1, -1 for r = -1."""
    return 2 * r / (1 + r) if r > -1 / 3 else -1.0


def rank_correlation(one: Float64[ndarray, " experts"], other: Float64[ndarray, " experts"]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else float("nan")


def overlap(
    one: Float64[ndarray, " experts"], other: Float64[ndarray, " experts"], *, keep: int, n_group: int = 1
) -> float:
    """Share of the ``keep`` most salient experts, the same number from each group, that both name."""
    mine, others = kept(one, keep=keep, n_group=n_group), kept(other, keep=keep, n_group=n_group)
    return float((mine & others).sum() / mine.sum())


def kept(saliency: Float64[ndarray, " experts"], *, keep: int, n_group: int = 1) -> Bool[ndarray, " experts"]:
    """Which experts are among the most salient; equal saliencies are decided by the lower id, as in a plan."""
    grouped = saliency.reshape(n_group, -1)
    best = np.argsort(-grouped, axis=-1, kind="stable")[:, : max(1, keep // n_group)]
    mask = np.zeros(grouped.shape, dtype=bool)
    np.put_along_axis(mask, best, values=True, axis=-1)
    return mask.reshape(-1)


def _is_constant(saliency: Float64[ndarray, " experts"]) -> bool:
    return bool((saliency == saliency[0]).all())


def _ranks(values: Float64[ndarray, " experts"]) -> Float64[ndarray, " experts"]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
