"""NVFP4 experts of compressed-tensors, which transformers dequantises without one of their scales, and says nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

GLOBAL_SCALE = ".weight_global_scale"


def why_wrong(keys: Iterable[str]) -> str | None:
    """Why this transformers would compute wrongly with stored experts; None if it leaves none of their scales out.

    The outputs would be wrong by orders of magnitude (https://github.com/huggingface/transformers/issues/48371).

    Args:
        keys: Names of the stored tensors.
    """
    found = next((key for key in keys if "experts." in key and key.endswith(GLOBAL_SCALE)), None)
    if found is None or _are_read():
        return None
    return f"this transformers leaves scales such as {found!r} out when it dequantises experts"


def _are_read() -> bool:
    """Whether the code that dequantises experts knows of such scales; that of transformers 5.23 does not."""
    try:
        from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
    except ImportError:
        return False
    return "global_scale" in inspect.getsource(CompressedTensorsDequantize)
