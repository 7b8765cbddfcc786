"""What a user should know before trusting a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy import ndarray

from moeprune.calibrate.coverage import STARVED_TOKENS, SuperExpert
from moeprune.facts import ModelFacts


def caveats(
    model: ModelFacts,
    chosen: Sequence[ndarray],
    *,
    routed: ndarray,
    seen: ndarray,
    top_k: int,
    n_group: int | None = None,
    super_experts: Sequence[SuperExpert] = (),
) -> Iterator[str]:
    """The warnings of a plan.

    Args:
        model: The model before pruning.
        chosen: Ids of the kept experts of each layer, the same number in each.
        routed: Tokens by layer and expert, domains mixed as asked.
        seen: The same without mixing: how much text the saliency of an expert rests on.
        top_k: Active experts a token.
        n_group: Expert groups of the pruned model; by default the model's.
        super_experts: Experts with outputs of a size that no other has.
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
        yield from _super_experts(model, chosen, super_experts)
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
        yield (
            f"no token was routed in {_some(layers)}: the kept experts there were chosen by their id alone. Calibrate "
            "on text that reaches them."
        )


def _super_experts(model: ModelFacts, chosen: Sequence[ndarray], super_experts: Sequence[SuperExpert]) -> Iterator[str]:
    """Scores that are means or counts do not see them: arXiv 2507.23279 lost a fifth of a model by three of 6,144."""
    kept = dict(zip(model.layers, chosen, strict=True))
    lost = [f"{one.layer} expert {one.expert}" for one in super_experts if one.expert not in kept[one.layer]]
    if lost:
        yield (
            f"super experts are pruned: {_some(lost)}. Their outputs are far larger than all others', and a model may "
            "collapse without them (arXiv 2507.23279). Keep more experts or choose by another score, and measure both."
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
