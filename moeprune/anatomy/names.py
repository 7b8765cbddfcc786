"""The names that model configs give to the number of experts, the top-k and the expert groups.

The only place that knows them. Each config class names a thing once (the canonical name) and may map aliases to it
(``attribute_map``); checkpoints on the Hub use any of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moeprune.errors import UnsupportedModelError

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token",
    "moe_topk", "moe_k", "top_k_experts", "moe_top_k",
)  # fmt: skip
N_GROUP = ("n_group", "num_expert_group")
# What configs of today call text_config, as checkpoints from before call it.
FORMER_KEYS = {"text_config": ("language_config", "llm_config")}
NUM_MTP = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers", "num_mtp_modules")


@dataclass(frozen=True)
class ConfigField:
    """One number of the config.

    Attributes:
        path: Keys from the root of config.json to the object that holds it: ``()`` or ``("text_config",)``.
        name: The name that the config class stores it under; ``""`` where the number is not in the config but in the
            model's code.
        aliases: All names that mean the same number, ``name`` included.
        value: Its value.
        fixed: Whether the model's code leaves no choice of the number, whatever the config says.
    """

    path: tuple[str, ...]
    name: str
    aliases: tuple[str, ...]
    value: int
    fixed: bool = False

    def within(self, config: dict[str, Any]) -> dict[str, Any]:
        """The object of a config.json that holds the number; it is added where config.json leaves all to defaults."""
        for key in self.path:
            spelled = next(
                (name for name in (key, *FORMER_KEYS.get(key, ())) if isinstance(config.get(name), dict)), key
            )
            if not isinstance(config.get(spelled), dict):
                config[spelled] = {}
            config = config[spelled]
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
        held = self.within(config)
        for name in self.names_in(config, self.value):
            before = held.get(name)
            held[name] = [value] * len(before) if isinstance(before, list) else value


def text_config_of(config: Any) -> tuple[tuple[str, ...], Any]:
    """The config of the language model and the path to it in config.json.

    Args:
        config: A ``PreTrainedConfig``.
    """
    if config.is_encoder_decoder and not hasattr(config, "text_config"):
        return (), config  # get_text_config would give a copy, to which nothing can be written
    text = config.get_text_config(decoder=True)
    path = _path_to(text, config)
    if path is None:
        raise UnsupportedModelError(f"{config.model_type}: its text config is a copy that cannot be edited.")
    return path, text


def _path_to(part: Any, config: Any) -> tuple[str, ...] | None:
    if part is config:
        return ()
    for key in getattr(config, "sub_configs", ()):
        value = getattr(config, key, None)
        rest = None if value is None else _path_to(part, value)
        if rest is not None:
            return (key, *rest)
    return None


def find_field(config: Any, names: tuple[str, ...]) -> ConfigField | None:
    """The first of ``names`` that the model's config knows as a positive whole number, or None.

    The language model's config is searched, then the configs inside it (DBRX keeps its experts in ``ffn_config``).
    """
    for where, holder in _holders(config):
        attribute_map = getattr(holder, "attribute_map", {})
        for name in names:
            canonical = attribute_map.get(name, name)
            value = _count(getattr(holder, canonical, None))
            if value is not None:
                aliases = (alias for alias, target in attribute_map.items() if target == canonical and alias in names)
                return ConfigField(where, canonical, (canonical, *aliases), value)
    return None


def found_instead(config: Any, names: tuple[str, ...]) -> str:
    """What the config holds under ``names`` where :func:`find_field` finds no count, for messages."""
    for _, holder in _holders(config):
        attribute_map = getattr(holder, "attribute_map", {})
        for canonical in (attribute_map.get(name, name) for name in names):
            value = getattr(holder, canonical, None)
            if value is not None:
                several = isinstance(value, list) and value
                return f"{canonical} lists {sorted(set(value))}" if several else f"{canonical} is {value}"
    return f"none of {', '.join(names)}"


def _holders(config: Any) -> list[tuple[tuple[str, ...], Any]]:
    path, text = text_config_of(config)
    return [(path, text), *(((*path, key), getattr(text, key, None)) for key in getattr(text, "sub_configs", ()))]


def _count(value: Any) -> int | None:
    """A positive whole number, or None; a list with the same number for every layer counts as one (Hunyuan-A13B)."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def groups_of(config: Any) -> tuple[int, int]:
    """(n_group, topk_group) of a group-limited router; (1, 1) where any experts may be combined."""
    field = find_field(config, N_GROUP)
    _, text = text_config_of(config)
    # A config.json may hold keys that its class does not know, as of the code it was forked from; DeepSeek-V2 keeps the
    # numbers also where its routing does not use them.
    known = {entry.name for entry in dataclasses.fields(text)}
    if field is None or known.isdisjoint(field.aliases) or field.value == 1:
        return 1, 1
    if getattr(text, "topk_method", None) == "greedy":
        return 1, 1
    return field.value, int(getattr(text, "topk_group", None) or field.value)


def group_score_of(config: Any) -> str:
    """What a group-limited router ranks its groups by: ``"max"`` in DeepSeek-V2's method, ``"top2"`` in all others."""
    _, text = text_config_of(config)
    return "max" if getattr(text, "topk_method", None) == "group_limited_greedy" else "top2"
