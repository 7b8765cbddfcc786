"""The config of a pruned model, both as an object in memory and as the text of config.json."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.names import (
    N_GROUP,
    NUM_EXPERTS,
    NUM_MTP,
    TOP_K,
    ConfigField,
    find_field,
    groups_of,
    text_config_of,
)
from moeprune.anatomy.skeleton import with_value
from moeprune.errors import UnsupportedModelError
from moeprune.files import write_json

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

    Raises:
        UnsupportedModelError: If transformers would not read the counts of the plan from it.
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
        _drop_mtp(config, anatomy)
    _check_reading(config, anatomy, num_experts=num_experts, top_k=top_k, n_group=n_group)
    return config


def _drop_mtp(config: dict[str, Any], anatomy: Anatomy) -> None:
    """Say that there are no prediction layers, also in lists that have entries for them behind those of the others."""
    holders = (config, anatomy.num_experts.within(config))
    counts = (holder.get(name) for holder in holders for name in NUM_MTP)
    num_mtp = max((count for count in counts if isinstance(count, int)), default=0)
    num_layers = getattr(anatomy.text_config, "num_hidden_layers", 0)
    for holder in holders:
        holder |= dict.fromkeys(holder.keys() & set(NUM_MTP), 0)
        for key, value in holder.items():
            if num_mtp and isinstance(value, list) and len(value) == num_layers + num_mtp:
                holder[key] = value[:num_layers]


def _check_reading(
    config: dict[str, Any], anatomy: Anatomy, *, num_experts: int, top_k: int, n_group: int | None
) -> None:
    """Read the config as transformers does: a name that it does not know would leave the counts of the original."""
    from huggingface_hub.errors import StrictDataclassError

    model_type = anatomy.config.model_type
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        write_json(file, config | {"model_type": model_type}, allow_nan=True)
        try:
            read = type(anatomy.config).from_json_file(file)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise UnsupportedModelError(
                f"{model_type}: transformers refuses the config of the pruned model: {error}"
            ) from error
    for names, expected in ((NUM_EXPERTS, num_experts), (TOP_K, top_k)):
        field = find_field(read, names)
        if field is not None and field.value != expected:
            raise UnsupportedModelError(
                f"{model_type}: transformers would read {field.name} = {field.value} from the config of the pruned "
                f"model, which should say {expected}. The place where config.json keeps it is not supported."
            )
    if n_group is not None and groups_of(read)[0] != n_group:
        raise UnsupportedModelError(f"{model_type}: its expert groups cannot be turned off in config.json.")


def _group_fields(config: PreTrainedConfig) -> list[ConfigField]:
    fields = (find_field(config, names) for names in (N_GROUP, TOPK_GROUP))
    return [field for field in fields if field is not None]
