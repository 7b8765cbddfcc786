"""The config of a pruned model, both as an object in memory and as the text of config.json."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.skeleton import with_value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def prune_config(anatomy: Anatomy, *, num_experts: int, top_k: int) -> PreTrainedConfig:
    """A copy of the model's config with the counts of a plan."""
    return with_value(with_value(anatomy.config, anatomy.num_experts, num_experts), anatomy.top_k, top_k)


def prune_config_json(raw: dict[str, Any], anatomy: Anatomy, *, num_experts: int, top_k: int) -> dict[str, Any]:
    """A copy of config.json with the counts of a plan under every name that a reader may look for.

    All other keys, unknown ones included, stay as they are and in their order: engines read keys that transformers does
    not know (``topk_method`` of DeepSeek-V3).
    """
    config = copy.deepcopy(raw)
    anatomy.num_experts.write(config, num_experts)
    anatomy.top_k.write(config, top_k)
    return config
