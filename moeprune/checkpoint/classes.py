"""Which class of transformers a checkpoint is loaded as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint.folder import read_config
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Checkpoints whose model_type transformers does not know, or takes for another model, while `architectures` names a
# class that it has, with the same tensors and the same fields in its config. Kimi-K2's deployment guide says to change
# the one word where a runtime does not know it; Hunyuan-A13B and MiniMax-M2 changed theirs on the Hub after release.
SAME_ARCHITECTURE: dict[tuple[str, str], str] = {
    ("kimi_k2", "DeepseekV3ForCausalLM"): "deepseek_v3",
    ("hunyuan", "HunYuanMoEV1ForCausalLM"): "hunyuan_v1_moe",
    ("minimax", "MiniMaxM2ForCausalLM"): "minimax_m2",
}


def known_as(config: Mapping[str, Any]) -> str | None:
    """The model type under which transformers knows the model of a config.json, if that is another than it says."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return SAME_ARCHITECTURE.get((str(config.get("model_type")), str(first)))


def transformers_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder as ``AutoConfig`` reads it, or as it would under the type of :func:`known_as`.

    Raises:
        ValueError: If transformers does not know the type or refuses the values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(path)
    known = known_as(raw)
    if known is not None:
        return CONFIG_MAPPING[known].from_dict(raw | {"model_type": known})
    return AutoConfig.from_pretrained(path, local_files_only=True)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the whole model: the config's first architecture, else what transformers' auto classes name.

    Raises:
        UnsupportedModelError: If there is neither.
    """
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    multimodal = [transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM]
    text = [transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM]
    composite = "text_config" in getattr(config, "sub_configs", ())
    # Some configs of multimodal models also name a class for their text tower alone; the whole model comes first.
    for auto in multimodal + text if composite else text + multimodal:
        mapping: Any = auto._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedModelError(
        f"{config.model_type}: transformers has no language model for it (architectures: {config.architectures})."
    )
