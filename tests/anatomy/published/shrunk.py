"""The published models at toy size: their real config.json with small widths, as checkpoints in the layout of the Hub.

Only sizes change (widths, depth, vocabulary). Experts, top-k, groups, layer patterns, scaling factors, kinds of rotary
embedding and keys that transformers does not know stay as published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.checkpoint.classes import model_class, transformers_config
from tests.anatomy.published import config_of

VOCAB, LAYERS, VISION_LAYERS = 160, 5, 2
HEADS, FEW_HEADS, HEAD_DIM = 4, 2, 16
WIDTHS = {
    "hidden_size": 48, "d_model": 48, "vocab_size": VOCAB, "head_dim": HEAD_DIM, "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS, "n_heads": HEADS,
    "intermediate_size": 40, "intermediate_size_mlp": 56, "mlp_intermediate_size": 56, "ffn_hidden_size": 40,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "rotary_dim": HEAD_DIM // 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "image_size": 16, "patch_size": 4, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
}  # fmt: skip
PER_LAYER = ("layer_types", "attn_type_list", "moe_topk", "num_shared_expert", "moe_intermediate_size")
KV_HEADS = ("num_key_value_heads", "kv_n_heads")
DEPTHS = ("num_hidden_layers", "n_layers")
FREQUENCIES = ("long_factor", "short_factor")  # one number for each pair of entries of a head

_EXPERT = "mlp.experts.#.{gate,up,down}_proj.weight"
_W = "block_sparse_moe.experts.#.{w1,w2,w3}.weight"
# Where the Hub's checkpoints keep experts and routers, below `model.layers.N.` unless a whole name is given; the names
# that llama.cpp's converter knows (gguf/tensor_mapping.py) and vLLM's loaders rename.
HUB_KEYS: dict[str, tuple[str, ...]] = {
    "mixtral": (_W, "block_sparse_moe.gate.weight"),
    "phimoe": (_W, "block_sparse_moe.gate.weight"),
    "minimax_m2": (_W, "block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"),
    "qwen2_moe": (_EXPERT, "mlp.gate.weight"),
    "qwen3_moe": (_EXPERT, "mlp.gate.weight"),
    "qwen3_next": (_EXPERT, "mlp.gate.weight"),
    "olmoe": (_EXPERT, "mlp.gate.weight"),
    "deepseek_v2": (_EXPERT, "mlp.gate.weight"),
    "deepseek_v3": (_EXPERT, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    "kimi_k2": (_EXPERT, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    "glm4_moe": (_EXPERT, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    "dots1": (_EXPERT, "mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    "ernie4_5_moe": (_EXPERT, "mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"),
    "hunyuan_v1_moe": (_EXPERT, "mlp.gate.wg.weight"),
    "lfm2_moe": (
        "feed_forward.experts.#.{w1,w2,w3}.weight", "feed_forward.gate.weight", "feed_forward.expert_bias",
    ),
    "jamba": ("feed_forward.experts.#.{gate,up,down}_proj.weight", "feed_forward.router.weight"),
    "gpt_oss": (
        "mlp.experts.{gate_up,down}_proj", "mlp.experts.{gate_up,down}_proj_bias", "mlp.router.{weight,bias}",
    ),
    "granitemoe": ("block_sparse_moe.{input,output}_linear.weight", "block_sparse_moe.router.layer.weight"),
    "llama4": (
        "language_model.model.layers.*.feed_forward.experts.{gate_up,down}_proj",
        "language_model.model.layers.*.feed_forward.router.weight",
    ),
    "dbrx": ("transformer.blocks.*.ffn.experts.mlp.{w1,v1,w2}", "transformer.blocks.*.ffn.router.layer.weight"),
}  # fmt: skip
ROUTED = re.compile(r"\.(experts|gate|router|moe_statics|expert_bias|e_score_correction_bias|(input|output)_linear)\b")
# Kept in float32 in checkpoints whose weights are not.
FLOAT32 = ("e_score_correction_bias", "expert_bias", "gate.wg.weight")


def shrunk(raw: Mapping[str, Any], *, layers: int = LAYERS) -> dict[str, Any]:
    """A published config with small sizes and without its quantisation."""
    return {key: _small(key, value, raw, layers) for key, value in raw.items() if key != "quantization_config"}


def _small(key: str, value: Any, raw: Mapping[str, Any], layers: int) -> Any:
    if isinstance(value, Mapping):
        return shrunk(value, layers=VISION_LAYERS if key == "vision_config" else layers)
    if key in DEPTHS:
        return min(value, layers)
    if key in KV_HEADS:
        return HEADS if value == raw.get("num_attention_heads", raw.get("n_heads")) else FEW_HEADS
    if key in PER_LAYER and isinstance(value, list):
        return [WIDTHS.get(key, item) for item in value[:layers]]
    if key in FREQUENCIES:
        return value[: WIDTHS["hidden_size"] // HEADS // 2]
    if key.endswith(("_token_id", "_token_index", "eod_token_id")):
        return [min(i, VOCAB - 1 - n) for n, i in enumerate(value)] if isinstance(value, list) else _id(value)
    return WIDTHS[key] if key in WIDTHS and value else value


def _id(value: int | None) -> int | None:
    return None if value is None else min(value, VOCAB - 1)


def is_routed(key: str) -> bool:
    """Whether a stored key is a weight or bias of routed experts."""
    return bool(re.search(r"\.experts\.|block_sparse_moe\.(input|output)_linear", key))


def patterns_of(keys: Iterable[str]) -> set[str]:
    """Stored keys of experts and routers, each number of a layer as ``*`` and of an expert as ``#``."""
    routed = (key for key in keys if ROUTED.search(key) and "shared" not in key and ".mlp.gate_proj" not in key)
    return {re.sub(r"(layers|blocks)\.\d+", r"\1.*", re.sub(r"experts\.\d+", "experts.#", key)) for key in routed}


def hub_patterns(model_type: str) -> set[str]:
    """:data:`HUB_KEYS` written out."""
    found = set()
    for pattern in HUB_KEYS[model_type]:
        before, brace, rest = pattern.partition("{")
        choices, _, after = rest.partition("}")
        whole = (f"{before}{choice}{after}" for choice in choices.split(",")) if brace else (pattern,)
        found |= {name if ".*." in name else f"model.layers.*.{name}" for name in whole}
    return found


def write_published(name: str, folder: Path) -> Path:
    """A small checkpoint of a published model with random weights, in the layout of the Hub."""
    folder.mkdir(parents=True)
    raw = shrunk(config_of(name))
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers_config(folder)
    torch.manual_seed(0)
    model_class(config)._from_config(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))  # transformers wrote its own
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors |= dict(_not_loaded(raw, tensors))
    values = {key: _value(key, tensor, generator) for key, tensor in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _value(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers that are large enough for every expert to matter."""
    dtype = torch.float32 if key.endswith(FLOAT32) else torch.bfloat16
    if "norm" in key and key.endswith("weight"):
        return torch.ones(tensor.shape, dtype=dtype)
    return (torch.randn(tensor.shape, generator=generator) * 0.2).to(dtype)


def _not_loaded(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What the Hub's checkpoints hold beside the model that transformers builds.

    Prediction layers under the names that vLLM's ``deepseek_mtp.py``, ``glm4_moe_mtp.py``, ``qwen3_next_mtp.py`` and
    ``ernie_mtp.py`` load; rotary frequencies in every layer of Moonshot's models (NVIDIA-NeMo/Megatron-Bridge #1838).
    """
    layers, width = raw.get("num_hidden_layers", 0), raw.get("hidden_size", 0)
    pair, one = torch.empty(width, 2 * width), torch.empty(width)
    if raw["model_type"] in ("deepseek_v3", "glm4_moe") and raw["num_nextn_predict_layers"]:
        prefix, table = f"model.layers.{layers}.", tensors["model.embed_tokens.weight"]
        yield from _copies(tensors, f"model.layers.{layers - 1}.", prefix)
        yield from [(f"{prefix}eh_proj.weight", pair), (f"{prefix}enorm.weight", one), (f"{prefix}hnorm.weight", one)]
        yield from [(f"{prefix}embed_tokens.weight", table), (f"{prefix}shared_head.head.weight", table)]
        yield f"{prefix}shared_head.norm.weight", one
    elif raw["model_type"] == "qwen3_next":
        yield from _copies(tensors, f"model.layers.{raw['full_attention_interval'] - 1}.", "mtp.layers.0.")
        yield from [("mtp.fc.weight", pair), ("mtp.norm.weight", one)]
        yield from [("mtp.pre_fc_norm_embedding.weight", one), ("mtp.pre_fc_norm_hidden.weight", one)]
    elif raw["model_type"] == "ernie4_5_moe":  # its prediction layer has no experts
        yield from _copies(tensors, "model.layers.0.", "model.mtp_block.0.")
        yield from [("model.mtp_emb_norm.0.weight", one), ("model.mtp_hidden_norm.0.weight", one)]
        yield "model.mtp_linear_proj.0.weight", pair
    if raw["model_type"] == "kimi_k2" or (raw["model_type"] == "deepseek_v3" and raw.get("seq_aux")):
        for layer in range(layers):
            yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", torch.empty(raw["qk_rope_head_dim"] // 2)


def _copies(tensors: Mapping[str, Tensor], layer: str, prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + key.removeprefix(layer), tensor) for key, tensor in tensors.items() if key.startswith(layer))
