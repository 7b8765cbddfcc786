"""Every quantity that calibration sums, as one table. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from moeprune.errors import StatsError, did_you_mean
from moeprune.facts import ModelFacts

LEVELS = ("standard", "merge", "full")
"""Each level holds all of those before it."""

NUM_BINS = 64
BYTES = 8  # every array is float64

Axis: TypeAlias = Literal["domains", "layers", "experts", "others", "ranks", "bins", "hidden"]
Kind: TypeAlias = Literal["sum", "max"]

PER_EXPERT: tuple[Axis, ...] = ("domains", "layers", "experts")
PER_LAYER: tuple[Axis, ...] = ("domains", "layers")
PAIRS: tuple[Axis, ...] = ("domains", "layers", "experts", "others")


@dataclass(frozen=True)
class Quantity:
    """A sum or a maximum over the tokens of calibration text.

    Attributes:
        name: Its name in files and in formulas.
        level: The lowest of :data:`LEVELS` that has it.
        axes: What its array is over; ``others`` is a second axis of experts, ``ranks`` counts the places in the top-k.
        meaning: What is summed, with g the weight that the model combines with and f the expert's unweighted output.
        source: Who needs it.
        kind: How two texts' values combine.
    """

    name: str
    level: str
    axes: tuple[Axis, ...]
    meaning: str
    source: str = ""
    kind: Kind = "sum"

    @property
    def halved(self) -> bool:
        """Whether it is also kept for the even and the odd rows of the text apart."""
        return self.axes == PER_EXPERT and self.level == "standard"

    def shape(self, model: ModelFacts, *, domains: int, hidden: int | None = None) -> tuple[int, ...]:
        """Its shape for a model; ``hidden`` is the size of a hidden state, needed only where that is an axis."""
        sizes = {
            "domains": domains,
            "layers": len(model.layers),
            "experts": model.num_experts,
            "others": model.num_experts,
            "ranks": model.top_k,
            "bins": NUM_BINS,
            "hidden": hidden,
        }
        shape = tuple(sizes[axis] for axis in self.axes)
        assert None not in shape, f"{self.name} needs the size of a hidden state"
        return tuple(int(size or 0) for size in shape)


TABLE = (
    Quantity("count", "standard", PER_EXPERT, "tokens routed to the expert", "arXiv 2505.03531"),
    Quantity("gate_sum", "standard", PER_EXPERT, "g", "arXiv 2505.03531, 2404.05089"),
    Quantity("norm_sum", "standard", PER_EXPERT, "|f|", "arXiv 2504.05586"),
    Quantity("norm_sq_sum", "standard", PER_EXPERT, "|f|^2", "arXiv 2606.15716"),
    Quantity("gated_norm_sum", "standard", PER_EXPERT, "|g f|", "arXiv 2510.13999"),
    Quantity("gated_norm_sq_sum", "standard", PER_EXPERT, "|g f|^2", "arXiv 2606.15716 (alpha = beta = 2)"),
    Quantity(
        "token_gated_norm_sum", "standard", PER_EXPERT,
        "s |g f|, with s = 1 - cos(x, x + y) of the token, x the residual stream that y, the sum of its g f, joins",
        "arXiv 2504.06792 (EASY-EP)",
    ),
    Quantity(
        "max_abs", "standard", PER_EXPERT, "largest |element| of any f (a maximum, not a sum)", "arXiv 2507.23279",
        kind="max",
    ),
    Quantity("gate_entropy_sum", "standard", PER_LAYER, "entropy in nats of the token's normalised weights"),
    Quantity(
        "margin_sum", "standard", PER_LAYER,
        "smallest router logit of a chosen expert less the largest of one that was not chosen: the gap between the "
        "k-th and the next one, and below 0 where a bias or groups overrule the logits",
    ),
    Quantity(
        "rank_gate_sum", "standard", (*PER_LAYER, "ranks"), "the token's j-th largest normalised weight",
        "arXiv 2505.03531 (fewer active experts)",
    ),
    Quantity(
        "gate_ratio_count", "standard", (*PER_LAYER, "ranks", "bins"),
        f"tokens by the ratio of their j-th largest to their largest weight, in {NUM_BINS} bins of equal width",
        "arXiv 2402.14800 (NAEE's dynamic skipping: beta is the median)",
    ),
    Quantity("coactivation", "merge", PAIRS, "tokens routed to both experts", "arXiv 2510.13999 (pairwise frequency)"),
    Quantity("logit_sum", "merge", PER_EXPERT, "router logit", "arXiv 2310.01334 (M-SMoE)"),
    Quantity("logit_gram", "merge", PAIRS, "product of two experts' router logits", "arXiv 2310.01334, 2604.04356"),
    Quantity("output_sum", "merge", ("layers", "experts", "hidden"), "f, a vector", "MoNE; arXiv 2310.01334"),
    Quantity("gated_output_sum", "merge", ("layers", "experts", "hidden"), "g f, a vector", "MoNE, arXiv 2604.04356"),
    Quantity("sampled_tokens", "full", ("layers",), "tokens of the sample, which every expert is run on"),
    Quantity(
        "sampled_output_sum", "full", ("layers", "experts", "hidden"), "f on every token of the sample, a vector",
        "arXiv 2410.08589 (HC-SMoE)",
    ),
    Quantity(
        "sampled_output_gram", "full", ("layers", "experts", "others"),
        "inner product of two experts' f on every token of the sample", "arXiv 2410.08589",
    ),
    Quantity(
        "sampled_output_cosine_sum", "full", ("layers", "experts", "others"),
        "cosine of two experts' f on every token of the sample", "arXiv 2604.04356 (REAM)",
    ),
)  # fmt: skip

QUANTITIES = MappingProxyType({quantity.name: quantity for quantity in TABLE})
"""The table by name. A token counts where g is not 0. Where a model multiplies the input of its experts by g, the
contribution f(g x) takes the place of g f, and what would need f(x) is absent: neither zero nor made up."""


def at_level(statistics: str) -> tuple[str, ...]:
    """The names that a level has.

    Raises:
        StatsError: If there is no such level.
    """
    if statistics not in LEVELS:
        hint = did_you_mean(statistics, LEVELS)
        raise StatsError(f"unknown level of statistics {statistics!r}. {hint}")
    below = LEVELS[: LEVELS.index(statistics) + 1]
    return tuple(name for name, quantity in QUANTITIES.items() if quantity.level in below)


def lowest(levels: Iterable[str]) -> str:
    """The lowest of some levels."""
    return min(levels, key=LEVELS.index)


def cost_of(
    statistics: str, model: ModelFacts, *, hidden: int, domains: int = 1, sampled: int = 0, reservoir: bool = False
) -> Mapping[str, int]:
    """What a level costs before it is run.

    Args:
        statistics: The level.
        model: The model.
        hidden: Size of a hidden state.
        domains: Number of text domains.
        sampled: Tokens of the sample (level ``full``).
        reservoir: Whether the inputs of all layers are kept for the sampled tokens.

    Returns:
        ``bytes``: size of the arrays in memory and in the file; ``largest``: of the largest array; ``reservoir_bytes``:
        of the file of layer inputs; ``extra_expert_tokens``: how often an expert is run on a token more than the
        model itself would run it, over all layers. One pass over the text runs ``top_k x layers`` experts a token.
    """
    sizes = []
    for name in at_level(statistics):
        quantity = QUANTITIES[name]
        size = math.prod(quantity.shape(model, domains=domains, hidden=hidden)) * BYTES
        sizes.append(size * 3 if quantity.halved else size)
    full = statistics == "full"
    layers = len(model.layers)
    return {
        "bytes": sum(sizes),
        "largest": max(sizes),
        "reservoir_bytes": layers * sampled * hidden * 2 if full and reservoir else 0,
        "extra_expert_tokens": layers * sampled * model.num_experts if full else 0,
    }
