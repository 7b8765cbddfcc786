"""Derive where a model keeps its experts by building it again with other counts and comparing shapes.

No table of architectures is needed, so a new transformers release is covered the day it appears. What shapes do not
show is in :mod:`moeprune.anatomy.quirks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.axes import find_axes
from moeprune.anatomy.config_checks import check_counts, check_groups
from moeprune.anatomy.layers import group_layers
from moeprune.anatomy.names import (
    NUM_EXPERTS,
    TOP_K,
    ConfigField,
    find_field,
    found_instead,
    group_score_of,
    groups_of,
    text_config_of,
)
from moeprune.anatomy.quirks.expert_ids import find_expert_ids
from moeprune.anatomy.quirks.fixed_top_k import fix_top_k
from moeprune.anatomy.quirks.unprobed_routers import routing_as_read
from moeprune.anatomy.routing import probe_routing
from moeprune.anatomy.skeleton import build_skeleton, with_value
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def derive_anatomy(config: PreTrainedConfig) -> Anatomy:
    """Derive the anatomy of the model that ``config`` describes. Reads no weight.

    Raises:
        UnsupportedModelError: If the model has no experts, or experts that cannot be indexed.
        CheckpointError: If the config asks for more active experts than there are, or for impossible groups.
    """
    num_experts = _num_experts(config)
    _, text = text_config_of(config)
    skeleton = build_skeleton(config)
    # Doubling keeps every divisibility that the config may rely on (groups), and costs nothing on the meta device.
    doubled = build_skeleton(with_value(config, num_experts, 2 * num_experts.value))
    state = skeleton.state_dict()
    found, own = find_axes(text.model_type, state, doubled.state_dict(), num_experts=num_experts.value)
    if not found:
        raise UnsupportedModelError(
            f"{config.model_type}: no tensor depends on {num_experts.name} (= {num_experts.value}), so there are no "
            "experts."
        )
    layers, axes, own_tensors = group_layers(text.model_type, skeleton, found, own)
    top_k = fix_top_k(config, find_field(config, TOP_K), skeleton, layers[-1], hidden_size=text.hidden_size)
    check_counts(config.name_or_path or config.model_type, num_experts, top_k)
    n_group, topk_group = groups_of(config)
    probed = probe_routing(skeleton, layers, axes, hidden_size=text.hidden_size)
    routing = routing_as_read(text.model_type, probed).model_copy(
        update={"n_group": n_group, "topk_group": topk_group, "group_score": group_score_of(config)}
    )
    check_groups(config.model_type, routing, num_experts=num_experts.value, top_k=top_k.value)
    return Anatomy(
        config=config,
        skeleton=skeleton,
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        axes=axes,
        routing=routing,
        own=own_tensors,
        expert_ids=find_expert_ids(text.model_type, skeleton, layers),
    )


def _num_experts(config: PreTrainedConfig) -> ConfigField:
    num_experts = find_field(config, NUM_EXPERTS)
    if num_experts is None or num_experts.value < 2:
        found = found_instead(config, NUM_EXPERTS)
        raise UnsupportedModelError(f"{config.model_type}: not a Mixture-of-Experts model (its config: {found}).")
    return num_experts
