"""What the stages must know of a model without loading it. Imports no torch, so that planning stays instant."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt


class Routing(BaseModel):
    """How a model turns router logits into a selection and its weights.

    Attributes:
        scoring: ``"softmax"``, ``"sigmoid"``, or ``"unknown"`` where the router could not be probed.
        renormalised: Whether the k weights of a token are divided by their sum. A softmax over all experts that is then
            renormalised over the top-k is the same function as a softmax over the top-k logits.
        scale: Constant that multiplies the weights (``routed_scaling_factor``).
        bias: ``"none"``, ``"router"`` (added to the logits) or ``"correction"`` (changes which experts are selected,
            not their weights).
        n_group: Number of expert groups; 1 means that routing is not group-limited.
        topk_group: Number of groups a token may use.
        group_score: What a group is worth: ``"top2"``, the sum of its two best experts, or ``"max"``, its best one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scoring: str = "unknown"
    renormalised: bool | None = None
    scale: float | None = None
    bias: str = "none"
    n_group: StrictInt = 1
    topk_group: StrictInt = 1
    group_score: Literal["top2", "max"] = "top2"

    def describe(self) -> str:
        """One line for people, such as ``sigmoid, correction bias, 4 of 8 groups, renormalised, x 2.5``."""
        if self.scoring == "softmax":
            parts = ["softmax over the top-k" if self.renormalised else "softmax before top-k, not renormalised"]
        else:
            parts = [self.scoring if self.scoring != "unknown" else "router of its own kind"]
            if self.renormalised is not None:
                parts.append("renormalised" if self.renormalised else "not renormalised")
        if self.bias != "none":
            parts.append(f"{self.bias} bias")
        if self.n_group > 1:
            parts.append(f"{self.topk_group} of {self.n_group} groups")
        if self.scale is not None and abs(self.scale - 1) > 1e-3:
            parts.append(f"weights x {self.scale:g}")
        return ", ".join(parts)


class ModelFacts(BaseModel):
    """The part of a model's anatomy that stats and plans carry along.

    Attributes:
        name: Where the model came from, as the user wrote it.
        model_type: ``model_type`` of its config.
        fingerprint: :meth:`moeprune.checkpoint.folder.Checkpoint.fingerprint`.
        layers: Paths of the decoder layers that hold experts, in order (``model.layers.3``).
        num_experts: Routed experts a layer.
        top_k: Routed experts a token uses.
        top_k_fixed: Whether the model's code leaves no choice of ``top_k``.
        routing: How the router works.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model_type: str
    fingerprint: str
    layers: tuple[str, ...]
    num_experts: StrictInt
    top_k: StrictInt
    top_k_fixed: StrictBool = False
    routing: Routing
