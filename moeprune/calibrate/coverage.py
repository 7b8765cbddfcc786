"""What calibration saw: how much text each expert rests on, which experts stand out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from moeprune.calibrate.load import load_entropy
from moeprune.calibrate.quantities import QUANTITIES
from moeprune.calibrate.reliability import kept, overlap, rank_correlation
from moeprune.calibrate.stats import Stats, check_same_model
from moeprune.score import SCORES

STARVED_TOKENS = 32
SUPER_PERCENTILE = 99.5
SUPER_SHARE = 0.1
SUPER_DEPTH = 0.75


Spread = tuple[int, float, int]
"""Fewest, median and most tokens of an expert."""


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens an expert in one layer.

    Attributes:
        layer: Its path.
        load_entropy: Entropy of the load over that of an even one: 1 is even.
        busiest: Tokens of the busiest expert over the mean.
        total: Tokens of an expert over all domains.
        tokens: The same by domain.
        starved: Experts with fewer than :data:`STARVED_TOKENS` tokens over all domains, but some.
        never_routed: Experts without a token.
    """

    layer: str
    load_entropy: float
    busiest: float
    total: Spread
    tokens: dict[str, Spread]
    starved: tuple[int, ...]
    never_routed: tuple[int, ...]


@dataclass(frozen=True)
class DomainCoverage:
    """Tokens an expert in one domain, over all layers that any token reached.

    Attributes:
        domain: Its name.
        text: Tokens of its text.
        tokens: Tokens of an expert.
        starved: How many experts it gave fewer than :data:`STARVED_TOKENS` tokens, but some.
        never_routed: How many it gave none.
    """

    domain: str
    text: int
    tokens: Spread
    starved: int
    never_routed: int


@dataclass(frozen=True)
class SuperExpert:
    """An expert with outputs of a size that no other has (:func:`super_experts`)."""

    layer: str
    expert: int
    max_abs: float


@dataclass(frozen=True)
class Agreement:
    """How alike two domains rank the experts by one score, as means over the layers that both saw.

    Attributes:
        domains: The two.
        correlation: Spearman's rank correlation of saliencies.
        overlap: Share of the kept half that both name.
    """

    domains: tuple[str, str]
    correlation: float
    overlap: float


def layer_coverage(stats: Stats) -> list[LayerCoverage]:
    """Tokens an expert, layer by layer; layers that no token reached are left out."""
    counts = stats.experts["count"]
    whole = counts.sum(axis=0)
    entropy = load_entropy(whole)
    found = []
    for index, name in enumerate(stats.model.layers):
        if name in stats.unseen_layers:
            continue
        load = whole[index]
        found.append(
            LayerCoverage(
                layer=name,
                load_entropy=float(entropy[index]),
                busiest=float(load.max() / load.mean()),
                total=_spread(load),
                tokens={domain: _spread(row) for domain, row in zip(stats.domains, counts[:, index], strict=True)},
                starved=tuple(int(i) for i in np.flatnonzero(is_starved(load))),
                never_routed=tuple(int(i) for i in np.flatnonzero(load == 0)),
            )
        )
    return found


def domain_coverage(stats: Stats) -> list[DomainCoverage]:
    """Tokens an expert, domain by domain; domains without text and layers that no token reached are left out."""
    reached = [name not in stats.unseen_layers for name in stats.model.layers]
    return [
        DomainCoverage(domain, int(tokens), _spread(load), int(is_starved(load).sum()), int((load == 0).sum()))
        for domain, tokens, load in zip(stats.domains, stats.tokens, stats.experts["count"][:, reached], strict=True)
        if tokens and any(reached)
    ]


def super_experts(stats: Stats) -> list[SuperExpert] | None:
    """Experts whose largest output is above the 99.5th percentile of all and above a tenth of the largest.

    That is the definition of arXiv 2507.23279, Eq. 6, without its set L of the layers in which massive activations
    form: as in the paper's code, L is the first three quarters of the layers. Pruning such an expert ruins a model.

    Returns:
        Largest first; None where ``max_abs`` is absent.
    """
    if "max_abs" not in stats.experts:
        return None
    peaks = stats.experts["max_abs"].max(axis=0)
    above: Bool[ndarray, "layers experts"] = (peaks > np.percentile(peaks, SUPER_PERCENTILE)) & (
        peaks > SUPER_SHARE * peaks.max()
    )
    early = np.arange(len(peaks)) < SUPER_DEPTH * len(peaks)
    at = sorted(zip(*np.nonzero(above & early[:, None]), strict=True), key=lambda place: -peaks[place])
    return [SuperExpert(stats.model.layers[layer], int(expert), float(peaks[layer, expert])) for layer, expert in at]


def _spread(load: Float64[ndarray, "..."]) -> Spread:
    return int(load.min()), float(np.median(load)), int(load.max())


def is_starved(load: Float64[ndarray, "..."]) -> Bool[ndarray, "..."]:
    """Which numbers of tokens are fewer than :data:`STARVED_TOKENS`, but some."""
    return (load > 0) & (load < STARVED_TOKENS)


def agreement(stats: Stats, *, score: str = "reap", keep: float = 0.5) -> list[Agreement]:
    """How alike every two domains that saw text rank the experts.

    Args:
        stats: The statistics.
        score: Name of the criterion.
        keep: Share of experts to keep.
    """
    seen = [name for name, tokens in zip(stats.domains, stats.tokens, strict=True) if tokens]
    count = max(1, round(keep * stats.model.num_experts))
    criterion, groups = SCORES.get(score), stats.model.routing.n_group
    saliency = {name: criterion.saliency(stats, domains={name: 1.0}) for name in seen}
    found = []
    for one, other in combinations(seen, 2):
        layers = [
            (a, b) for a, b in zip(saliency[one], saliency[other], strict=True) if np.ptp(a) > 0 and np.ptp(b) > 0
        ]
        correlation = [rank_correlation(a, b) for a, b in layers]
        shared = [overlap(a, b, keep=count, n_group=groups) for a, b in layers]
        if layers:
            found.append(Agreement((one, other), float(np.mean(correlation)), float(np.mean(shared))))
    return found


def difference(one: Stats, other: Stats, *, score: str = "reap", keep: float = 0.5) -> dict[str, Any]:
    """How two statistics of one model differ, as plain JSON.

    Args:
        one: Statistics.
        other: Statistics of the same model.
        score: Name of the criterion by which experts are ranked.
        keep: Share of experts to keep.

    Raises:
        StatsError: If they are of different models.
    """
    check_same_model([one, other], what="compared")
    count = max(1, round(keep * one.model.num_experts))
    criterion, groups = SCORES.get(score), one.model.routing.n_group
    saliency = [criterion.saliency(stats) for stats in (one, other)]
    layers = []
    for index, name in enumerate(one.model.layers):
        a, b = (values[index] for values in saliency)
        masks = [kept(values, keep=count, n_group=groups) for values in (a, b)]
        layers.append(
            {
                "layer": name,
                "correlation": rank_correlation(a, b) if np.ptp(a) > 0 and np.ptp(b) > 0 else None,
                "overlap": overlap(a, b, keep=count, n_group=groups),
                "only_first": [int(i) for i in np.flatnonzero(masks[0] & ~masks[1])],
                "only_second": [int(i) for i in np.flatnonzero(masks[1] & ~masks[0])],
            }
        )
    return {
        "score": score,
        "keep": count,
        "tokens": [int(stats.tokens.sum()) for stats in (one, other)],
        "domains": [list(stats.domains) for stats in (one, other)],
        "largest_difference": _largest(one, other),
        "overlap": float(np.mean([layer["overlap"] for layer in layers])),
        "layers": layers,
    }


def _largest(one: Stats, other: Stats) -> dict[str, float | None]:
    """Of every quantity the largest difference as a share of the largest value; None where only one has it.

    Sums are divided by the tokens first: twice the text is no difference.
    """
    found: dict[str, float | None] = {}
    mine, others = (
        {name: array / (tokens if QUANTITIES[name].kind == "sum" else 1) for name, array in stats.mixed().items()}
        for stats, tokens in ((one, one.tokens.sum()), (other, other.tokens.sum()))
    )
    for name in [*dict.fromkeys([*mine, *others])]:
        if name in mine and name in others:
            scale = max(float(np.abs(mine[name]).max()), float(np.abs(others[name]).max()))
            found[name] = float(np.abs(mine[name] - others[name]).max()) / scale if scale else 0.0
        else:
            found[name] = None
    return found
