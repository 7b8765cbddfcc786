"""Models with random weights, whose routers and experts differ from each other as those of trained models do."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SMALL = {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 4096, "norm_topk_prob": True, "initializer_range": 0.06,
}  # fmt: skip
"""27 M parameters in 4 layers of 64 experts, top-8."""

LARGE = SMALL | {
    "vocab_size": 32_768, "hidden_size": 2048, "num_hidden_layers": 8, "moe_intermediate_size": 768,
    "intermediate_size": 6144, "num_attention_heads": 32, "head_dim": 128, "initializer_range": 0.02,
}  # fmt: skip
"""2.7 G parameters, 5.3 GB in bfloat16: 8 layers of the sizes of Qwen3-30B-A3B, with 64 experts each."""

GATE_SPREAD, OUTPUT_SPREAD = 0.3, 0.5


def make_qwen3_moe(sizes: dict[str, Any], *, dtype: str, device: str = "cpu", seed: int = 0) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE made where it is to run.

    Routers lean towards some experts, and experts write outputs of different sizes: load and saliency are uneven.

    Args:
        sizes: Of its config.
        dtype: Of its parameters.
        device: Where it is made; no copy is made elsewhere.
        seed: Of its weights.
    """
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    make_uneven(model)
    return model.eval()


def make_uneven(model: Qwen3MoeForCausalLM) -> None:
    """Scale the rows of routers and the experts' down projections by log-normal factors."""
    with torch.no_grad():
        for layer in model.model.layers:
            block: Any = layer.mlp
            rows = block.gate.weight
            rows *= torch.randn(len(rows), 1, device=rows.device).mul(GATE_SPREAD).exp().to(rows.dtype)
            down = block.experts.down_proj
            down *= torch.randn(len(down), 1, 1, device=down.device).mul(OUTPUT_SPREAD).exp().to(down.dtype)
