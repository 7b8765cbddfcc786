"""Tiny models of every family under test, built in code.

All sizes differ (hidden, intermediate, experts, top-k, layers), so that a transposed or mixed-up axis cannot go unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MLA_COMMON = COMMON | {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "intermediate_size": 44, "n_shared_experts": 1,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, num_hidden_layers=3, head_dim=8, num_experts=10, num_experts_per_tok=3, moe_intermediate_size=24,
        intermediate_size=44, mlp_only_layers=[1], norm_topk_prob=True,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON, num_hidden_layers=2, num_experts=10, num_experts_per_tok=3, moe_intermediate_size=24,
        intermediate_size=44, shared_expert_intermediate_size=28,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=2, intermediate_size=24,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **COMMON, num_hidden_layers=2, num_experts=10, num_experts_per_tok=3, intermediate_size=24,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **MLA_COMMON, n_routed_experts=12, n_group=3, topk_group=2, topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **MLA_COMMON, n_routed_experts=16, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **COMMON, num_hidden_layers=3, head_dim=8, first_k_dense_replace=1, n_routed_experts=10, num_experts_per_tok=3,
        moe_intermediate_size=24, intermediate_size=44, n_shared_experts=1, n_group=1, topk_group=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, num_local_experts=10, num_experts_per_tok=3, intermediate_size=24,
        sliding_window=16,
    ),
}  # fmt: skip


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of the family with random weights large enough that every expert matters; biases are not zero."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.fill_(1.0)
    return model


def save(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "50GB") -> Path:
    """Save a tiny model of the family as a checkpoint folder and return the folder."""
    build(family, dtype=dtype, seed=seed).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_with_tokenizer(folder: Path, *, seed: int = 0) -> Path:
    """Save a tiny Qwen3-MoE that takes the embedded model's tokenizer, and that tokenizer; return the folder."""
    from moeprune.checkpoint.load import load_tokenizer
    from moeprune.demo import MODEL_DIR

    tokenizer = load_tokenizer(MODEL_DIR)
    config = FAMILIES["qwen3_moe"]()
    config.vocab_size = len(tokenizer)
    config.max_position_embeddings = 512
    torch.manual_seed(seed)
    transformers.Qwen3MoeForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
