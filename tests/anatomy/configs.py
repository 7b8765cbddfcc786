"""config.json of published models, shortened to what decides their shape, and what their makers say about their
size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Parameters in billions, as published.

    Attributes:
        config: config.json.
        total: All parameters.
        active: Parameters a token uses.
        active_counts_embeddings: Whether ``active`` includes the input embedding.
    """

    config: dict[str, Any]
    total: float
    active: float
    active_counts_embeddings: bool = True


def keys(**pairs: Any) -> dict[str, Any]:
    """config.json without the noise of quotation marks."""
    return pairs


PUBLISHED = {
    # arXiv:2412.19437: "671B total parameters, of which 37B are activated"; the multi-token prediction layer comes on
    # top.
    "DeepSeek-V3": Published(
        total=671, active=37,
        config=keys(
            architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", first_k_dense_replace=3,
            hidden_act="silu", hidden_size=7168, intermediate_size=18432, kv_lora_rank=512,
            max_position_embeddings=163840, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8,
            n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128,
            num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1,
            q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=2.5,
            scoring_func="sigmoid", tie_word_embeddings=False, topk_group=4, topk_method="noaux_tc",
            torch_dtype="bfloat16", v_head_dim=128, vocab_size=129280,
        ),
    ),
    # Model card: "30.5B in total and 3.3B activated", 29.9B without embeddings.
    "Qwen3-30B-A3B": Published(
        total=30.5, active=3.3,
        config=keys(
            architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", decoder_sparse_step=1, head_dim=128,
            hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, mlp_only_layers=[],
            moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128,
            num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4, tie_word_embeddings=False,
            torch_dtype="bfloat16", vocab_size=151936,
        ),
    ),
    # Model card: "235B in total and 22B activated", 234B without embeddings.
    "Qwen3-235B-A22B": Published(
        total=235, active=22,
        config=keys(
            architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", decoder_sparse_step=1, head_dim=128,
            hidden_size=4096, intermediate_size=12288, max_position_embeddings=40960, mlp_only_layers=[],
            moe_intermediate_size=1536, norm_topk_prob=True, num_attention_heads=64, num_experts=128,
            num_experts_per_tok=8, num_hidden_layers=94, num_key_value_heads=4, tie_word_embeddings=False,
            torch_dtype="bfloat16", vocab_size=151936,
        ),
    ),
    # mistral.ai/news/mixtral-of-experts: "46.7B total parameters but only uses 12.9B parameters per token".
    "Mixtral-8x7B": Published(
        total=46.7, active=12.9,
        config=keys(
            architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_act="silu", hidden_size=4096,
            intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2,
            num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, rms_norm_eps=1e-05,
            rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
            vocab_size=32000,
        ),
    ),
    # arXiv:2409.02060, table 1: 6.9B total, 1.3B active, embeddings included.
    "OLMoE-1B-7B": Published(
        total=6.92, active=1.28,
        config=keys(
            architectures=["OlmoeForCausalLM"], model_type="olmoe", attention_bias=False, clip_qkv=None,
            hidden_size=2048, intermediate_size=1024, max_position_embeddings=4096, norm_topk_prob=False,
            num_attention_heads=16, num_experts=64, num_experts_per_tok=8, num_hidden_layers=16,
            num_key_value_heads=16, tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=50304,
        ),
    ),
    # arXiv:2508.10925, table 1: 20.91B total, 3.61B active; "the active count includes unembedding, not embedding".
    "gpt-oss-20b": Published(
        total=20.91, active=3.61, active_counts_embeddings=False,
        config=keys(
            architectures=["GptOssForCausalLM"], model_type="gpt_oss", attention_bias=True, eos_token_id=200002,
            experts_per_token=4, head_dim=64, hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
            max_position_embeddings=131072, num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24,
            num_key_value_heads=8, num_local_experts=32, sliding_window=128, swiglu_limit=7.0,
            tie_word_embeddings=False, vocab_size=201088, rope_scaling=keys( beta_fast=32.0, beta_slow=1.0,
            factor=32.0, original_max_position_embeddings=4096, rope_type="yarn", truncate=False, ),
        ),
    ),
}  # fmt: skip
