"""Which class of transformers a checkpoint is loaded as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
