"""The arithmetic behind the router plots."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float, Int

from moeprune.report.facts import Facts, RouterFacts


def by_load(load: Float[np.ndarray, "layers experts"]) -> Int[np.ndarray, "layers experts"]:
    """Expert ids of each layer, the most used first; ties keep the order of the ids."""
    return np.argsort(-load, axis=1, kind="stable")


def kept_mask(router: RouterFacts, variant: str) -> np.ndarray:
    """True where an expert stays, layers x experts."""
    mask = np.zeros(np.shape(router.load), dtype=bool)
    for layer, kept in enumerate(router.kept[variant]):
        mask[layer, kept] = True
    return mask


def load_after(router: RouterFacts, variant: str) -> Float[np.ndarray, "layers experts"]:
    """Share of routed tokens after pruning at the experts' old places; NaN where an expert is gone."""
    shares = np.full(np.shape(router.load), np.nan)
    for layer, (kept, row) in enumerate(zip(router.kept[variant], router.after[variant], strict=True)):
        shares[layer, kept] = row
    return shares


def specialisation(router: RouterFacts) -> Float[np.ndarray, "layers"]:
    """Bits that a routed token's expert tells about its domain, all domains equally likely; at most log2(domains)."""
    shares = domain_shares(router)
    mean = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / mean), 0.0)
    return terms.sum(axis=2).mean(axis=0)


def domain_shares(router: RouterFacts) -> Float[np.ndarray, "domains layers experts"]:
    """Load by domain, in the order of the domains."""
    return np.array([router.load_by_domain[name] for name in domain_names(router)])


def domain_names(router: RouterFacts) -> list[str]:
    """Domains that have loads, in the order the facts name them."""
    named = [name for name in router.domains if name in router.load_by_domain]
    return named + [name for name in router.load_by_domain if name not in named]


def shown_plans(facts: Facts, *, most: int) -> list[str]:
    """Plans that drop experts: exported ones first, then by method rather than at random, then the strongest cut."""
    assert facts.router is not None
    kept, experts = facts.router.kept, len(facts.router.load[0])
    pruned = [v for v in facts.slimmed if any(len(row) < experts for row in kept.get(v.name, []))]
    ranked = sorted(pruned, key=lambda v: (not v.exported, v.score == "random", v.bytes))
    return [variant.name for variant in ranked[:most]]


def layer_numbers(layers: list[str]) -> list[str]:
    """``model.layers.3.mlp`` becomes ``3``; a name without a number becomes its position."""
    found = [re.findall(r"\d+", name) for name in layers]
    return [numbers[0] if numbers else str(position) for position, numbers in enumerate(found)]
