"""For which shapes vLLM and SGLang ship a tuned configuration of their Triton kernel for experts.

``tuned.json`` lists the names of those files without the device: vLLM 0.32.0
(``model_executor/layers/fused_moe/configs``) and SGLang 0.5.23 (``srt/layers/moe/moe_runner/triton_utils/configs``, all
Triton versions together, files for the down projection alone left out).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

GPUS = (
    "a100", "a800", "b200", "gb200", "h100", "h20", "h200", "h800", "l40s", "mi300x", "mi325x", "rtx4090",
)  # fmt: skip
BLACKWELL = ("b200", "gb200")


@cache
def _names() -> dict[str, dict[str, frozenset[str]]]:
    data = json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))
    return {engine: {gpu: frozenset(names) for gpu, names in gpus.items()} for engine, gpus in data.items()}


def has_tuned_file(
    engine: str, gpu: str, *, num_experts: int, width: int, dtype: str | None, block: tuple[int, int] | None
) -> bool:
    """Whether the engine ships a file for this shape.

    Args:
        engine: ``"vllm"`` or ``"sglang"``.
        gpu: One of :data:`GPUS`.
        num_experts: Experts that one device holds.
        width: Intermediate size of an expert on one device.
        dtype: Name of the quantisation in the file name, None for unquantised.
        block: Rows and columns of a quantisation block.
    """
    return file_stem(num_experts=num_experts, width=width, dtype=dtype, block=block) in _names()[engine].get(gpu, ())


def file_stem(*, num_experts: int, width: int, dtype: str | None, block: tuple[int, int] | None) -> str:
    """The file's name without device and suffix (vllm 0.32.0 layers/fused_moe/fused_moe.py:1093)."""
    parts = [f"E={num_experts}", f"N={width}"]
    if dtype is not None:
        parts.append(f"dtype={dtype}")
    if block is not None:
        parts.append(f"block_shape=[{block[0]},{block[1]}]")
    return ",".join(parts)
