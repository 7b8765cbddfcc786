"""Which stored tensors decide where tokens go."""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.anatomy.roles import AllExperts, Towers
from moeprune.anatomy.source import Source
from moeprune.checkpoint.header import TensorInfo
from moeprune.checkpoint.values import masked_experts
from moeprune.errors import PlanError
from moeprune.plan.plan import LayerPlan


def biases_of(source: Source, routers: Mapping[str, int]) -> dict[str, str]:
    """The tensors among ``routers`` with one value an expert, by stored key, with the expert layer that each is of."""
    tensors, roles = source.checkpoint.tensors, source.roles
    found = {}
    for key, dim in routers.items():
        role = roles[key]
        if isinstance(role, AllExperts) and tensors[key].numel == tensors[key].shape[dim]:
            found[key] = role.layer
    return found


def check_choosable(bias: TensorInfo, *, layer: LayerPlan, top_k: int) -> None:
    """Refuse to keep fewer experts that a router can choose than a token uses: it would take masked ones.

    Args:
        bias: A router's bias, where -inf masks an expert.
        layer: What the plan keeps of its layer.
        top_k: Active experts a token after pruning.

    Raises:
        PlanError: If too few are left.
    """
    masked = masked_experts(bias)
    left = len(set(layer.keep) - masked)
    if left < top_k:
        raise PlanError(
            f"{layer.layer}: of the {len(layer.keep)} experts that the plan keeps, {left} can be chosen (the others "
            f"have -inf in {bias.name!r}), and a token uses {top_k}. Keep others, or lower --top-k."
        )


def router_dims(source: Source) -> dict[str, int]:
    """The routers' tensors by stored key, with the axis that counts experts: what should be looked at before export.

    They are known by their size: a tensor of one or two axes, one entry or row an expert, is a router's weight or
    bias (or a bias of the experts, which is as small); the weights of all experts of a layer have more.

    Args:
        source: The checkpoint and the roles of its tensors.
    """
    return {
        key: role.dim
        for key, role in source.roles.items()
        if isinstance(role, Towers)
        or (isinstance(role, AllExperts) and role.rows == 1 and len(source.checkpoint.tensors[key].shape) <= 2)
    }
