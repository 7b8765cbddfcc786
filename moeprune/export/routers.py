"""Which stored tensors decide where tokens go."""

from __future__ import annotations

from moeprune.anatomy.roles import AllExperts, Towers
from moeprune.anatomy.source import Source


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
