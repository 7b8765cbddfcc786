"""What a user should know before trusting a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy import ndarray

from moeprune.facts import ModelFacts

STARVED_TOKENS = 32


def caveats(
    model: ModelFacts,
    chosen: Sequence[ndarray],
    *,
    routed: ndarray,
    seen: ndarray,
    top_k: int,
    n_group: int | None = None,
) -> Iterator[str]:
    """The warnings of a plan.

    Args:
        model: The model before pruning.
        chosen: Ids of the kept experts of each layer, the same number in each.
        routed: Tokens by layer and expert, domains mixed as asked.
        seen: The same without mixing: how much text the saliency of an expert rests on.
        top_k: Active experts a token.
        n_group: Expert groups of the pruned model; by default the model's.
    """
    count = len(chosen[0])
    at = np.arange(len(chosen))[:, None], np.stack(chosen)
    if count < model.num_experts:
        yield from _unseen(model, seen)
        starved = int((seen[at] < STARVED_TOKENS).sum())
        if starved:
            yield (
                f"{starved} of the {seen[at].size} kept experts saw fewer than {STARVED_TOKENS} calibration tokens; "
                "their saliency is a guess. Calibrate on more text."
            )
        yield from _softmax(model, dropped=1 - float(routed[at].sum() / max(routed.sum(), 1)))
    if n_group == 1 < model.routing.n_group:
        yield (
            f"group-limited routing is turned off: a token could use {model.routing.topk_group} of "
            f"{model.routing.n_group} groups and may now use any experts, which is another function even with all "
            "experts kept. Measure it against a plan that keeps the groups."
        )
    if top_k == count:
        yield f"every token uses all {count} experts: the router only weighs them."


def _unseen(model: ModelFacts, seen: ndarray) -> Iterator[str]:
    """Where no token was routed all saliencies are equal, and equal saliencies are decided by the lower id."""
    layers = [name for name, tokens in zip(model.layers, seen.sum(axis=1), strict=True) if not tokens]
    if layers:
        named = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        yield (
            f"no token was routed in {named}: the kept experts there were chosen by their id alone. Calibrate on text "
            "that reaches them."
        )


def _softmax(model: ModelFacts, *, dropped: float) -> Iterator[str]:
    """A softmax over all experts depends on those that are dropped; sigmoids and a softmax over the top-k do not."""
    if model.routing.scoring != "softmax":
        return
    if model.routing.renormalised is False:
        yield (
            "this router takes a softmax over all experts and does not renormalise the top-k: without the pruned "
            f"experts the gate weights of the others grow. {dropped:.0%} of the routed tokens chose a pruned expert."
        )
    if model.routing.bias == "correction":
        yield (
            "this router selects by a softmax over all experts plus a bias: without the pruned experts the "
            "probabilities of the others grow and the bias does not, so that tokens choose others also among the "
            f"kept experts. {dropped:.0%} of the routed tokens chose a pruned expert."
        )
