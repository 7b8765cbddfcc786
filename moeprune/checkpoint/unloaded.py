"""Stored tensors that transformers does not load although nothing is wrong with the checkpoint."""

from __future__ import annotations

import re
from typing import Any

MTP = re.compile(r"(?:^|[._])(?:mtp|nextn)(?:[._]|$)")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Scales of activations, for engines that quantise these too; transformers computes with the dequantised weights.
ACTIVATION_SCALES = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale")


def is_mtp(key: str, num_layers: int | None) -> bool:
    """Whether a stored tensor that the model does not have belongs to a multi-token prediction layer.

    Args:
        key: Its name.
        num_layers: Decoder layers of the model. Prediction layers follow them, if they have no name of their own.
    """
    layer = LAYER.search(key)
    return bool(MTP.search(key)) or (layer is not None and num_layers is not None and int(layer.group(1)) >= num_layers)


def is_expected(key: str, config: Any) -> bool:
    """Whether a strict load may leave a stored tensor out.

    Args:
        key: Its name.
        config: The model's ``PreTrainedConfig``.
    """
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    quantised = getattr(config, "quantization_config", None) is not None
    return is_mtp(key, getattr(text, "num_hidden_layers", None)) or (quantised and key.endswith(ACTIVATION_SCALES))
