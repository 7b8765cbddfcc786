"""The config of a pruned model, both as an object in memory and as the text of config.json."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.names import N_GROUP, NUM_MTP, ConfigField, find_field, text_config_of
from moeprune.anatomy.skeleton import with_value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOPK_GROUP = ("topk_group",)
# DeepSeek-V2 says by a name whether it routes in groups; its Lite checkpoints, which do not, say "greedy".
GROUPED_METHOD, PLAIN_METHOD = "group_limited_greedy", "greedy"


def prune_config(anatomy: Anatomy, *, num_experts: int, top_k: int, n_group: int | None = None) -> PreTrainedConfig:
    """A copy of the model's config with the counts of a plan.

    Args:
        anatomy: The model before pruning.
        num_experts: Experts a layer.
        top_k: Active experts a token.
        n_group: 1 turns group-limited routing off; None leaves it as it is.
    """
    config = with_value(with_value(anatomy.config, anatomy.num_experts, num_experts), anatomy.top_k, top_k)
    if n_group is not None:
        for field in _group_fields(config):
            config = with_value(config, field, n_group)
        _, text = text_config_of(config)
        if getattr(text, "topk_method", None) == GROUPED_METHOD:
            text.topk_method = PLAIN_METHOD
    return config


def prune_config_json(
    raw: dict[str, Any],
    anatomy: Anatomy,
    *,
    num_experts: int,
    top_k: int,
    n_group: int | None = None,
    mtp: str = "prune",
) -> dict[str, Any]:
    """A copy of config.json with the counts of a plan under every name that a reader may look for.

    All other keys, unknown ones included, stay as they are and in their order: engines read keys that transformers does
    not know (``topk_method`` of DeepSeek-V3).

    Args:
        raw: config.json of the model before pruning.
        anatomy: The model before pruning.
        num_experts: Experts a layer.
        top_k: Active experts a token.
        n_group: 1 turns group-limited routing off, by ``n_group = topk_group = 1``: llama.cpp refuses equal numbers
            above 1 (src/llama-model.cpp:1369 at ggml 0.25.3). None leaves the groups as they are.
        mtp: ``"drop"`` sets the number of multi-token prediction layers to 0.
    """
    config = copy.deepcopy(raw)
    anatomy.num_experts.write(config, num_experts)
    anatomy.top_k.write(config, top_k)
    if n_group is not None:
        for field in _group_fields(anatomy.config):
            field.write(config, n_group)
            if field.within(config).get("topk_method") == GROUPED_METHOD:
                field.within(config)["topk_method"] = PLAIN_METHOD
    if mtp == "drop":
        for holder in (config, anatomy.num_experts.within(config)):
            holder |= dict.fromkeys(holder.keys() & set(NUM_MTP), 0)
    return config


def _group_fields(config: PreTrainedConfig) -> list[ConfigField]:
    fields = (find_field(config, names) for names in (N_GROUP, TOPK_GROUP))
    return [field for field in fields if field is not None]
