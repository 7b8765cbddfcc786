"""NVFP4 experts of compressed-tensors, which transformers dequantises without one of their scales, and says nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

GLOBAL_SCALE = ".weight_global_scale"


def left_out_scale(keys: Iterable[str]) -> str | None:
    """The scale of an expert's whole tensor that this transformers would leave out; None if there is no such scale.

    The outputs would be wrong by orders of magnitude (https://github.com/huggingface/transformers/issues/48371).

    Args:
        keys: Names of the stored tensors.
    """
    found = next((key for key in keys if "experts." in key and key.endswith(GLOBAL_SCALE)), None)
    return None if found is None or _are_read() else found


def left_out_because(key: str) -> str:
    """The sentence that says so."""
    return f"this transformers leaves scales such as {key!r} out when it dequantises experts"


def _are_read() -> bool:
    """Whether the code that dequantises experts knows of such scales; that of transformers 5.23 does not."""
    try:
        from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
    except ImportError:
        return False
    return "global_scale" in inspect.getsource(CompressedTensorsDequantize)
