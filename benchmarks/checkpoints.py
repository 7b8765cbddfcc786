"""Checkpoints as they lie on the Hub, made without a model: names and shapes from a config, zeros or noise as data."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from moeprune.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from moeprune.checkpoint.header import DTYPE_BITS, encode_header
from moeprune.files import write_json

Tensor = tuple[str, str, tuple[int, ...]]
BLOCK = 128  # of FP8 scales
NOISE_BYTES = 1 << 25


def deepseek_v3(config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of DeepSeek-V3, its multi-token prediction layer included; FP8 with a scale for each 128 x 128 block.

    Names and shapes follow the inference code and the file list of https://huggingface.co/deepseek-ai/DeepSeek-V3.
    """
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        path = f"model.layers.{layer}"
        yield from _latent_attention(f"{path}.self_attn", config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{norm}.weight", "BF16", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from _fp8_mlp(f"{path}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _fp8_experts(f"{path}.mlp", config)
        if layer >= layers:
            yield f"{path}.embed_tokens.weight", "BF16", (vocab, hidden)
            yield f"{path}.enorm.weight", "BF16", (hidden,)
            yield f"{path}.hnorm.weight", "BF16", (hidden,)
            yield f"{path}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield f"{path}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{path}.shared_head.head.weight", "BF16", (vocab, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocab, hidden)


def qwen3_moe(config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of Qwen3-MoE in bfloat16, each expert's by itself, as in https://huggingface.co/Qwen/Qwen3-30B-A3B."""
    hidden, vocab, head = config["hidden_size"], config["vocab_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        yield f"{path}.self_attn.q_proj.weight", "BF16", (heads * head, hidden)
        yield f"{path}.self_attn.k_proj.weight", "BF16", (kv_heads * head, hidden)
        yield f"{path}.self_attn.v_proj.weight", "BF16", (kv_heads * head, hidden)
        yield f"{path}.self_attn.o_proj.weight", "BF16", (hidden, heads * head)
        for norm in ("q_norm", "k_norm"):
            yield f"{path}.self_attn.{norm}.weight", "BF16", (head,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{norm}.weight", "BF16", (hidden,)
        yield f"{path}.mlp.gate.weight", "BF16", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name, shape in _mlp_shapes(hidden, config["moe_intermediate_size"]):
                yield f"{path}.mlp.experts.{expert}.{name}.weight", "BF16", shape
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocab, hidden)


def write_checkpoint(
    folder: Path, *, config: dict[str, Any], tensors: Iterable[Tensor], num_shards: int, sparse: bool
) -> int:
    """Write a checkpoint folder.

    Args:
        folder: The folder to make.
        config: Its config.json.
        tensors: Name, dtype and shape of each tensor; they are stored by name within a shard, as writers do.
        num_shards: Number of safetensors files, of nearly equal size.
        sparse: Store headers only; the data are holes, which read as zeros and take no room. Otherwise they are noise
            in [1, 2), finite in every float format of two bytes.

    Returns:
        Bytes of the tensors.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    listed = list(tensors)
    ends = list(accumulate(map(_num_bytes, listed)))
    groups: list[list[Tensor]] = [[] for _ in range(num_shards)]
    for tensor, end in zip(listed, ends, strict=True):
        groups[min(num_shards - 1, (end - 1) * num_shards // ends[-1])].append(tensor)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = SINGLE_NAME if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        _write_shard(folder / name, sorted(group), sparse=sparse)
        weight_map |= {tensor[0]: name for tensor in group}
    if num_shards > 1:
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": ends[-1]}, "weight_map": weight_map})
    return ends[-1]


def read_config(path: Path) -> dict[str, Any]:
    """A config.json."""
    return json.loads(path.read_text())


def _write_shard(path: Path, tensors: list[Tensor], *, sparse: bool) -> None:
    sizes = [_num_bytes(tensor) for tensor in tensors]
    with path.open("wb") as file:
        file.write(encode_header(((*t, n) for t, n in zip(tensors, sizes, strict=True)), {"format": "pt"}))
        left = sum(sizes)
        if sparse:
            file.truncate(file.tell() + left)
            return
        # The upper byte of each number is 0x3F, the lower one random with its first bit set: 1 to 2 in bfloat16.
        noise = bytearray(random.Random(path.name).randbytes(NOISE_BYTES))
        noise[1::2] = b"\x3f" * (NOISE_BYTES // 2)
        noise[::2] = bytes(byte | 0x80 for byte in noise[::2])
        while left:
            left -= file.write(memoryview(noise)[: min(left, NOISE_BYTES)])


def _num_bytes(tensor: Tensor) -> int:
    return prod(tensor[2]) * DTYPE_BITS[tensor[1]] // 8


def _fp8(name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    yield f"{name}.weight", "F8_E4M3", shape
    yield f"{name}.weight_scale_inv", "F32", (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def _mlp_shapes(hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "gate_proj", (inner, hidden)
    yield "up_proj", (inner, hidden)
    yield "down_proj", (hidden, inner)


def _fp8_mlp(path: str, hidden: int, inner: int) -> Iterator[Tensor]:
    for name, shape in _mlp_shapes(hidden, inner):
        yield from _fp8(f"{path}.{name}", shape)


def _fp8_experts(path: str, config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    yield f"{path}.gate.weight", "BF16", (experts, hidden)
    yield f"{path}.gate.e_score_correction_bias", "F32", (experts,)
    yield from _fp8_mlp(f"{path}.shared_experts", hidden, inner * config["n_shared_experts"])
    for expert in range(experts):
        yield from _fp8_mlp(f"{path}.experts.{expert}", hidden, inner)


def _latent_attention(path: str, config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield from _fp8(f"{path}.q_a_proj", (q_rank, hidden))
    yield f"{path}.q_a_layernorm.weight", "BF16", (q_rank,)
    yield from _fp8(f"{path}.q_b_proj", (heads * (nope + rope), q_rank))
    yield from _fp8(f"{path}.kv_a_proj_with_mqa", (kv_rank + rope, hidden))
    yield f"{path}.kv_a_layernorm.weight", "BF16", (kv_rank,)
    yield from _fp8(f"{path}.kv_b_proj", (heads * (nope + value), kv_rank))
    yield from _fp8(f"{path}.o_proj", (hidden, heads * value))
