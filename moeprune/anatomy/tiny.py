"""A model type at toy size: its own config class with every width, depth and vocabulary made small.

The support table and the tests over all families build these. Fields are recognised by name, so that a model type that
did not exist when this was written is usually covered, too; one that cannot be shrunk is named, never skipped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from moeprune.anatomy import names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCAB = 97
# Sizes differ wherever the architecture lets them, so that a transposed or mixed-up axis cannot go unseen.
SIZES: dict[str, int] = {
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    "mel_vocab_size": 16, "codebook_size": 16, "ngram_vocab_size_base": 50,
    "hidden_size": 32, "d_model": 32, "decoder_dim": 32, "vision_hidden_size": 32, "text_hidden_size": 32,
    "out_hidden_size": 32, "out_dim": 32, "output_dim": 32, "thinker_hidden_size": 32, "audio_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_hidden_size": 32, "projection_hidden_dim": 32, "projection_intermediate_size": 40,
    "intermediate_size": 44, "intermediate_size_mlp": 44, "dense_intermediate_size": 44, "d_ff": 44,
    "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "ffn_hidden_size": 44, "mlp_dim": 44,
    "moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "moe_hidden_size": 16,
    "shared_expert_intermediate_size": 28, "moe_shared_expert_intermediate_size": 28, "share_expert_dim": 28,
    "shared_experts_intermediate_size": 28, "shared_intermediate_size": 28,
    "num_hidden_layers": 4, "n_layers": 4, "num_layers": 4, "encoder_layers": 4, "decoder_layers": 4,
    "num_decoder_layers": 4, "depth": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "layer_group_size": 2,
    "global_attn_every_n_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "moe_layer_end_index": 3, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2,
    "n_layers_per_attn_res_block": 2,
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "swa_num_attention_heads": 4, "num_sliding_attention_heads": 4, "num_key_value_heads": 2, "kv_n_heads": 2,
    "swa_num_key_value_heads": 2, "head_dim": 8, "swa_head_dim": 8, "kv_channels": 8, "d_kv": 8, "linear_head_dim": 8,
    "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "q_lora_rank": 20, "kv_lora_rank": 12, "o_lora_rank": 12, "o_groups": 2,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "qk_head_dim": 12, "v_head_dim": 8, "rotary_dim": 4, "d_rel": 4,
    "rel_extent": 16,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 6, "index_topk_blocks": 2, "index_block_size": 4,
    "gated_norm_rank": 4, "hc_mult": 2, "hc_count": 2, "hc_lowrank": 4, "router_hidden_size": 20,
    "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_dt_rank": 4, "mamba_head_dim": 8,
    "mamba_num_heads": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "mamba_chunk_size": 8, "block_size": 8,
    "ple_embed_dim": 8, "heads_per_ngram": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 2,
    "sliding_window": 16, "sliding_window_size": 16, "sliding_window_pattern": 2, "attention_chunk_size": 16,
    "keep_window_size": 16,
    "max_position_embeddings": 128, "max_seq_len": 128, "model_max_length": 128, "max_source_positions": 32,
    "image_size": 16, "patch_size": 4, "num_position_embeddings": 16, "projector_input_dim": 32,
    "projector_output_dim": 32, "adapter_input_size": 32, "downsample_hidden_size": 8, "vision_output_dim": 32,
}  # fmt: skip
# More experts than any other size is likely to be by accident, and divisible into groups.
NUM_EXPERTS, TOP_K, GROUPS, TOPK_GROUP = 12, 3, 3, 2
ROUTING: dict[str, int] = {
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "num_experts_per_token": TOP_K, "moe_topk": TOP_K,
    "moe_k": TOP_K, "top_k_experts": TOP_K, "moe_top_k": TOP_K, "n_group": GROUPS, "num_expert_group": GROUPS,
    "topk_group": TOPK_GROUP, "zero_expert_num": 5, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "expert_capacity": 64,
}  # fmt: skip

# Set even where a config's default is none of them: without these there are no experts.
NEEDED = frozenset({*names.NUM_EXPERTS, *names.TOP_K, "moe_intermediate_size"})
# Left to the config class where it computes them from others.
DERIVED = frozenset({"head_dim", "qk_head_dim"})
# What a name alone does not tell, by model type (or class, where there is none) of the config or of one inside it.
_FOUR_LAYERS = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "beam": _FOUR_LAYERS,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": _FOUR_LAYERS | {"num_experts_per_tok": TOP_K},
    "deepseek_v2": {"num_experts_per_tok": TOP_K},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_out_dim": 32, "num_key_value_heads": 4},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 20, "swa_kv_lora_rank": 12,
        "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 12,
    },
    "dots3_note_vision_encoder": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "diffusion_gemma_text": {"enable_moe_block": True},
    "gemma4_text": {"enable_moe_block": True},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 20],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "flint": {"decoder_sparse_step": 1},
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 2, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1]},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "radio": {"video_temporal_patch_size": 2},
    "phimoe": {"num_experts_per_tok": 2},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 28},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p5": _FOUR_LAYERS | {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """The config of a model type, shrunk.

    Args:
        config_class: The type's config class.
        **changes: Fields to set to something else.
    """
    return config_class(**(_shrunk(config_class()) | changes))


def sub_configs_of(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedConfig]]:
    """The classes of the configs inside a config, as its defaults fill them in; as it names them if it has none."""
    named = dict(getattr(config_class, "sub_configs", {}))
    if not named:
        return []
    try:
        filled = vars(config_class())
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
    ):  # not to be made from defaults alone
        filled = {}
    parts = [type(filled[name]) if filled.get(name) is not None else part for name, part in named.items()]
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments that make a small config of the class of ``config`` (default values)."""
    small: dict[str, Any] = {}
    sub_configs = getattr(config, "sub_configs", {})
    for field in dataclasses.fields(config):
        name = field.name
        aliases = getattr(config, "attribute_map", {})
        value = vars(config).get(aliases.get(name, name))  # getattr refuses fields that differ between layers
        if name in sub_configs:
            if value is not None:
                small[name] = _shrunk(value) | ({"model_type": value.model_type} if value.model_type else {})
        elif isinstance(value, dict) and {"moe_num_experts"} & value.keys():
            small[name] = {key: (SIZES | ROUTING).get(key, item) for key, item in value.items()}
        elif value is None and name in NEEDED:
            small[name] = (ROUTING | SIZES)[name]
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name.endswith(("_token_id", "_token_index", "_bos_id", "_eos_id", "_pad_id")) and value >= VOCAB:
            small[name] = VOCAB - 1 - len([other for other in small if other.endswith(("_id", "_index"))])
        elif name in ROUTING:
            small[name] = min(ROUTING[name], value) if "group" in name else ROUTING[name]
        elif name in SIZES and not (field.default is None and name in DERIVED):
            small[name] = SIZES[name]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has as many of both
    return small | EXCEPTIONS.get(config.model_type or type(config).__name__, {})
