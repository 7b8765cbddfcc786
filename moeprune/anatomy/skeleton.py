"""A model without weights, built from its config on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moeprune.anatomy.config_checks import check_spellings
from moeprune.anatomy.names import ConfigField
from moeprune.checkpoint.classes import known_as, model_class, transformers_config
from moeprune.errors import CheckpointError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder as its transformers class.

    Raises:
        UnsupportedModelError: If the installed transformers does not know the model type.
        CheckpointError: If the values in config.json are refused by the config class.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    from moeprune.checkpoint.folder import read_config

    raw = read_config(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"{path / 'config.json'}: no model_type, so the architecture is unknown.")
    check_spellings(raw, path / "config.json")
    model_type = known_as(raw) or model_type
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING.keys()).partition(" Known:")[0]
        hint = f"{hint} " if hint.startswith("Did") else ""
        raise UnsupportedModelError(
            f"{path}: model type {model_type!r} is unknown to the installed transformers. {hint}"
            "Update transformers; models that need remote code are not supported."
        )
    try:
        return transformers_config(path)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / 'config.json'}: refused by transformers: {error}") from error


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of ``config`` with all parameters on the meta device: shapes and dtypes, no memory.

    Raises:
        UnsupportedModelError: If transformers cannot build it, as where a list has fewer entries than there are layers.
    """
    cls = model_class(config)
    try:
        with torch.device("meta"):
            return cls._from_config(copy.deepcopy(config))
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build the model that its config describes "
            f"({type(error).__name__}: {error}). Compare config.json with the original."
        ) from error


def with_value(config: PreTrainedConfig, field: ConfigField, value: int) -> PreTrainedConfig:
    """A copy of ``config`` in which one number differs; the same where the number is not in the config."""
    changed = copy.deepcopy(config)
    if not field.name:
        return changed
    target = changed
    for key in field.path:
        target = getattr(target, key)
    setattr(target, field.name, value)
    return changed
