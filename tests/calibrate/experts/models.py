"""Tiny models whose experts are held, called or routed in ways of their own."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeTextModel
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from tests.models import COMMON, VOCAB

T5 = {
    "vocab_size": VOCAB, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "num_experts": 6, "router_dtype": "float32",
}  # fmt: skip
ERNIE_VL = {
    **COMMON, "num_hidden_layers": 2, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": [24, 20],
    "moe_num_shared_experts": 1, "intermediate_size": 44, "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}  # fmt: skip

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "dbrx": lambda: transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=VOCAB,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    ),
    "longcat_flash": lambda: transformers.LongcatFlashConfig(
        **(COMMON | {"num_key_value_heads": 4}), num_layers=2, ffn_hidden_size=44, q_lora_rank=20, kv_lora_rank=24,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, head_dim=4, moe_topk=3, n_routed_experts=6,
        zero_expert_num=5, expert_ffn_hidden_size=24, routed_scaling_factor=1.5,
    ),
    "step3p5": lambda: transformers.AutoConfig.for_model(
        "step3p5", **COMMON, num_hidden_layers=3, head_dim=8, n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, intermediate_size=44, share_expert_dim=28, moe_router_scaling_factor=2.0,
        mlp_layer_types=["dense", "sparse", "sparse"], swiglu_limits=[0.0, 0.02, 0.0], sliding_window=16,
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, num_local_experts=6, num_experts_per_tok=2, intermediate_size=24,
        intermediate_size_mlp=44,
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_key_value_heads=4, kv_channels=6,
        intermediate_size=28, num_local_experts=6, num_experts_per_tok=2, max_position_embeddings=128,
    ),
    "switch_transformers": lambda: transformers.SwitchTransformersConfig(
        **T5, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, expert_capacity=2,
    ),
    "nllb-moe": lambda: transformers.NllbMoeConfig(
        **T5, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64,
        max_position_embeddings=128,
    ),
    "zaya": lambda: transformers.ZayaConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, num_experts=6, num_experts_per_tok=1, moe_intermediate_size=24,
        router_hidden_size=20,
    ),
    "inkling_text": lambda: transformers.InklingTextConfig(
        **COMMON, num_hidden_layers=3, head_dim=8, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
        n_shared_experts=2, intermediate_size=44, mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, global_head_dim=8, num_experts=6, top_k_experts=2,
        moe_intermediate_size=24, intermediate_size=44, enable_moe_block=True, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"], sliding_window=16,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(
        **COMMON, num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=3, intermediate_size=24,
    ),
    "deepseek_v4": lambda: transformers.DeepseekV4Config(
        **COMMON, num_hidden_layers=3, head_dim=8, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
        q_lora_rank=20, o_lora_rank=12, o_groups=2, qk_rope_head_dim=4, index_n_heads=2, index_head_dim=8, index_topk=6,
        hc_mult=2, mlp_layer_types=["hash_moe", "moe", "moe"], sliding_window=16, swiglu_limit=0.05,
    ),
    "ernie4_5_vl_moe_text": lambda: transformers.AutoConfig.for_model("ernie4_5_vl_moe_text", **ERNIE_VL),
}  # fmt: skip

BUILDERS: dict[str, Callable[[PreTrainedConfig], PreTrainedModel]] = {
    "step3p5": Step3p7TextModel, "ernie4_5_vl_moe_text": Ernie4_5_VLMoeTextModel,
    "switch_transformers": transformers.SwitchTransformersForConditionalGeneration,
    "nllb-moe": transformers.NllbMoeForConditionalGeneration,
}  # fmt: skip

PATHS: dict[str, tuple[str, ...]] = {
    "dbrx": ("transformer.blocks.0.ffn.experts", "transformer.blocks.1.ffn.experts"),
    "longcat_flash": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
    "step3p5": ("layers.1.mlp.experts", "layers.2.mlp.experts"),
    "llama4_text": ("model.layers.0.feed_forward.experts", "model.layers.1.feed_forward.experts"),
    "jetmoe": (
        "model.layers.0.self_attention.experts", "model.layers.0.mlp",
        "model.layers.1.self_attention.experts", "model.layers.1.mlp",
    ),
    "switch_transformers": ("encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts"),
    "nllb-moe": ("model.encoder.layers.1.ffn.experts", "model.decoder.layers.1.ffn.experts"),
    "zaya": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
    "inkling_text": ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts"),
    "gemma4_text": ("model.layers.0.experts", "model.layers.1.experts"),
    "phimoe": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
    "deepseek_v4": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts", "model.layers.2.mlp.experts"),
    "ernie4_5_vl_moe_text": ("layers.1.mlp.text_moe.experts", "layers.1.mlp.vision_moe.experts"),
}  # fmt: skip
NUM_EXPERTS = 6


def build(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights of which no two experts are alike; norms are 1."""
    torch.manual_seed(seed)
    config = CONFIGS[model_type]()
    builder = BUILDERS.get(model_type, transformers.AutoModelForCausalLM.from_config)
    model = builder(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.fill_(1.0)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in tensor]))
    return model
