"""A top-k that the config names but the model's code does not read, or that has no config entry at all.

A plan that lowers it would promise a speed that the model does not have; PhiMoE answers with two experts whatever its
config says, and Switch and NLLB have their 1 and 2 in the code.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from moeprune.anatomy.names import TOP_K, ConfigField, found_instead
from moeprune.anatomy.routing import run_router
from moeprune.anatomy.skeleton import build_skeleton, with_value
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from moeprune.anatomy.anatomy import MoeLayer

IN_CODE = {"switch_transformers": 1, "nllb-moe": 2}


def fix_top_k(
    config: PreTrainedConfig,
    field: ConfigField | None,
    skeleton: PreTrainedModel,
    layer: MoeLayer,
    *,
    hidden_size: int,
) -> ConfigField:
    """Say whether the config decides the top-k, by building the model with another one and running its router.

    Args:
        config: The model's config.
        field: Its top-k, if it names one.
        skeleton: The model on the meta device.
        layer: A layer whose router is run.
        hidden_size: Size of the router's input.

    Returns:
        The field, marked ``fixed`` where another value changes nothing or is refused by the config.

    Raises:
        UnsupportedModelError: If there is no top-k to be found.
    """
    if field is None:
        if config.model_type not in IN_CODE:
            raise UnsupportedModelError(
                f"{config.model_type}: its config gives no one number of active experts for all layers "
                f"({found_instead(config, TOP_K)}). Only models that use as many experts in every layer are supported."
            )
        return ConfigField((), "", (), IN_CODE[config.model_type], fixed=True)
    other = field.value - 1 if field.value > 1 else 2
    before = run_router(skeleton, layer, hidden_size=hidden_size)
    try:
        changed = with_value(config, field, other)
        for part in (changed, changed.get_text_config()):
            part.validate()
        after = run_router(build_skeleton(changed), layer, hidden_size=hidden_size)
    except (StrictDataclassError, ValueError):
        return dataclasses.replace(field, fixed=True)
    if before is None or after is None:
        return field
    return dataclasses.replace(field, fixed=before.indices.shape[-1] == after.indices.shape[-1])
