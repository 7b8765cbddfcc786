"""The names that model configs give to the number of experts, the top-k and the expert groups.

The only place that knows them. Each config class names a thing once (the canonical name) and may map aliases to it
(``attribute_map``); checkpoints on the Hub use any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeprune.errors import UnsupportedModelError

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token",
    "moe_topk", "moe_k", "top_k_experts", "moe_top_k",
)  # fmt: skip
N_GROUP = ("n_group", "num_expert_group")
# What runtimes read where transformers itself writes only the canonical name. transformers 4 reads `num_experts` of a
# Qwen3-MoE and assumes 128 where it is missing, which is a wrong model, not an error.


@dataclass(frozen=True)
class ConfigField:
    """One number of the config.

    Attributes:
        path: Keys from the root of config.json to the object that holds it: ``()`` or ``("text_config",)``.
        name: The name that the config class stores it under.
        aliases: All names that mean the same number, ``name`` included.
        value: Its value.
    """

    path: tuple[str, ...]
    name: str
    aliases: tuple[str, ...]
    value: int

    def within(self, config: dict[str, Any]) -> dict[str, Any]:
        """The object of a config.json that holds the number."""
        for key in self.path:
            config = config[key]
        return config

    def names_in(self, config: dict[str, Any], value: int) -> tuple[str, ...]:
        """All names under which a config.json must hold the number.

        The aliases, and whatever other name of the same thing holds ``value`` there: gpt-oss checkpoints say
        ``experts_per_token`` as well, which transformers ignores and TensorRT-LLM reads.
        """
        held = self.within(config)
        synonyms = next((group for group in (NUM_EXPERTS, TOP_K, N_GROUP) if self.name in group), ())
        return (*self.aliases, *(name for name in synonyms if name not in self.aliases and held.get(name) == value))

    def write(self, config: dict[str, Any], value: int) -> None:
        """Set the number in a config.json in place, under every name, so that all readers agree."""
        for name in self.names_in(config, self.value):
            self.within(config)[name] = value


def text_config_of(config: Any) -> tuple[tuple[str, ...], Any]:
    """The config of the language model and the path to it in config.json.

    Args:
        config: A ``PreTrainedConfig``.
    """
    text = config.get_text_config(decoder=True)
    if text is config:
        return (), config
    for key, value in vars(config).items():
        if value is text:
            return (key,), text
    raise UnsupportedModelError(
        f"{config.model_type}: its text config is a copy that cannot be edited (an encoder-decoder model). "
        "moeprune prunes decoder models."
    )


def find_field(config: Any, names: tuple[str, ...]) -> ConfigField | None:
    """The first of ``names`` that the model's config knows as a positive whole number, or None."""
    path, text = text_config_of(config)
    attribute_map = getattr(text, "attribute_map", {})
    for name in names:
        canonical = attribute_map.get(name, name)
        value = getattr(text, canonical, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            mapped = tuple(alias for alias, target in attribute_map.items() if target == canonical and alias in names)
            return ConfigField(path, canonical, (canonical, *mapped), value)
    return None


def groups_of(config: Any) -> tuple[int, int]:
    """(n_group, topk_group) of a group-limited router; (1, 1) where any experts may be combined."""
    field = find_field(config, N_GROUP)
    _, text = text_config_of(config)
    # DeepSeek-V2 keeps the numbers in its config also where its routing does not use them.
    if field is None or field.value == 1 or getattr(text, "topk_method", None) == "greedy":
        return 1, 1
    return field.value, int(getattr(text, "topk_group", None) or field.value)
