"""Statistics without a model: random numbers that could have come from one."""

from collections.abc import Sequence

import numpy as np

from moeprune.calibrate.stats import Stats
from moeprune.facts import ModelFacts, Routing


def facts(
    name: str = "tiny",
    *,
    num_experts: int = 10,
    top_k: int = 3,
    num_layers: int = 2,
    fingerprint: str = "ab" * 32,
    **routing,
) -> ModelFacts:
    """A model of which layer 0 is dense."""
    return ModelFacts(
        name=name,
        model_type="qwen3_moe",
        fingerprint=fingerprint,
        layers=tuple(f"model.layers.{index + 1}" for index in range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        routing=Routing(**{"scoring": "softmax", "renormalised": True} | routing),
    )


def fake_stats(
    model: ModelFacts | None = None, *, domains: Sequence[str] = ("code", "math"), tokens: int = 4000, seed: int = 0
) -> Stats:
    """``tokens`` in the first domain, twice as many in the second, and so on; the last expert is never routed to."""
    model = model or facts()
    rng = np.random.default_rng(seed)
    stats = Stats.zeros(model, domains=domains)
    for at in range(len(domains)):
        stats.tokens[at] = tokens * (at + 1)
        shape = len(model.layers), model.num_experts
        shares = rng.dirichlet(np.full(model.num_experts - 1, 5.0), size=len(model.layers))
        stats.experts["count"][at, :, :-1] = np.floor(shares * stats.tokens[at] * model.top_k)
        used = stats.experts["count"][at] > 0
        for name in stats.experts.keys() - {"count", "max_abs"}:
            stats.experts[name][at] = stats.experts["count"][at] * rng.uniform(0.1, 3.0, shape)
        stats.experts["max_abs"][at] = used * rng.uniform(1.0, 9.0, shape)
        stats.layers["gate_entropy_sum"][at] = rng.uniform(0.5, 1.0, len(model.layers)) * stats.tokens[at]
    stats.runs = [{"seed": seed, "note": "größer"}]
    return stats
