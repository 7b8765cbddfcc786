"""GGUF files as llama.cpp's converter and quantiser lay them out, written by the gguf package.

Rows are 256 long, the block of the K-quants; experts, top-k, rows and blocks differ, so that a mixed-up axis is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFWriter

from moeprune.facts import ModelFacts, Routing
from moeprune.plan.plan import LayerPlan, Plan

HIDDEN, FF, EXPERTS, TOP_K, BLOCKS = 256, 512, 12, 3, 3
QUANTISABLE = (T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.TQ1_0, T.TQ2_0)
TOKENS = ["<s>", "</s>", "ein", "straße", "日本", "\n", ""]


@dataclass(frozen=True)
class Family:
    """One architecture's way to store experts.

    Attributes:
        architecture: ``general.architecture``.
        model_type: Of the Hugging Face model.
        layer: Paths of its decoder layers.
        dense: Blocks without experts.
        n_group: Expert groups.
        mtp: Blocks for multi-token prediction, after the others.
        tensors: Adds the tensors of one block with experts.
    """

    architecture: str
    model_type: str
    tensors: Callable[[Any, int], None]
    layer: str = "model.layers.{}"
    dense: tuple[int, ...] = ()
    n_group: int = 1
    mtp: int = 0
    kinds: tuple[T, ...] = field(default=(T.Q8_0, T.Q4_K, T.Q6_K))


class Builder:
    """A GGUF file in the making; every tensor has other random values."""

    def __init__(self, path: Path, family: Family, *, seed: int = 0, **split: int) -> None:
        self.writer = GGUFWriter(path, family.architecture, **split)
        self.family, self.rng = family, np.random.default_rng(seed)

    def add(self, name: str, shape: Sequence[int], kind: T = T.F32) -> None:
        """A tensor of ``shape`` in numpy's order (experts first)."""
        self.writer.add_tensor(name, random_blocks(self.rng, shape, kind), raw_dtype=kind)

    def router(self, block: int) -> None:
        self.add(f"blk.{block}.ffn_gate_inp.weight", (EXPERTS, HIDDEN))

    def experts(self, block: int) -> None:
        gate, up, down = self.family.kinds
        self.add(f"blk.{block}.ffn_gate_exps.weight", (EXPERTS, FF, HIDDEN), gate)
        self.add(f"blk.{block}.ffn_up_exps.weight", (EXPERTS, FF, HIDDEN), up)
        self.add(f"blk.{block}.ffn_down_exps.weight", (EXPERTS, HIDDEN, FF), down)

    def shared(self, block: int) -> None:
        self.add(f"blk.{block}.ffn_gate_shexp.weight", (FF, HIDDEN), T.Q8_0)
        self.add(f"blk.{block}.ffn_gate_inp_shexp.weight", (HIDDEN,))


def qwen3moe(b: Builder, i: int) -> None:
    b.router(i)
    b.experts(i)
    b.add(f"blk.{i}.attn_q_norm.weight", (EXPERTS,))  # a size that equals the number of experts by accident


def quantised_router(b: Builder, i: int) -> None:
    b.add(f"blk.{i}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), T.Q8_0)
    b.experts(i)


def deepseek2(b: Builder, i: int) -> None:
    b.router(i)
    b.experts(i)
    b.shared(i)
    b.add(f"blk.{i}.exp_probs_b.bias", (EXPERTS,))


def ernie(b: Builder, i: int) -> None:
    b.router(i)
    b.experts(i)
    b.add(f"blk.{i}.exp_probs_b.bias", (1, EXPERTS))


def gpt_oss(b: Builder, i: int) -> None:
    b.router(i)
    b.add(f"blk.{i}.ffn_gate_inp.bias", (EXPERTS,))
    b.experts(i)
    for name, size in (("gate", FF), ("up", FF), ("down", HIDDEN)):
        b.add(f"blk.{i}.ffn_{name}_exps.bias", (EXPERTS, size))


def old_mixtral(b: Builder, i: int) -> None:
    b.router(i)
    for expert in range(EXPERTS):
        b.add(f"blk.{i}.ffn_gate.{expert}.weight", (FF, HIDDEN), T.Q4_K)
        b.add(f"blk.{i}.ffn_down.{expert}.weight", (HIDDEN, FF), T.Q6_K)
        b.add(f"blk.{i}.ffn_up.{expert}.weight", (FF, HIDDEN), T.Q4_K)


def gemma4(b: Builder, i: int) -> None:
    b.router(i)
    b.add(f"blk.{i}.ffn_gate_inp.scale", (HIDDEN,))
    b.add(f"blk.{i}.ffn_gate_up_exps.weight", (EXPERTS, 2 * FF, HIDDEN), T.IQ4_XS)
    b.add(f"blk.{i}.ffn_down_exps.weight", (EXPERTS, HIDDEN, FF), T.Q5_1)
    b.add(f"blk.{i}.ffn_down_exps.scale", (EXPERTS,))
    b.add(f"blk.{i}.ffn_gate.weight", (FF, HIDDEN), T.Q8_0)
    b.add(f"blk.{i}.post_ffw_norm_2.weight", (HIDDEN,))


FAMILIES = {
    "qwen3moe": Family("qwen3moe", "qwen3_moe", qwen3moe, dense=(1,)),
    "deepseek2": Family("deepseek2", "deepseek_v3", deepseek2, dense=(0,), n_group=3),
    "ernie4_5-moe with a bias of two dimensions": Family("ernie4_5-moe", "ernie4_5_moe", ernie),
    "gpt-oss": Family("gpt-oss", "gpt_oss", gpt_oss, kinds=(T.MXFP4, T.MXFP4, T.MXFP4)),
    "mixtral": Family("llama", "mixtral", qwen3moe, kinds=(T.IQ2_XXS, T.IQ3_S, T.Q3_K)),
    "mixtral, a tensor an expert": Family("llama", "mixtral", old_mixtral),
    "gemma4": Family("gemma4", "gemma4_text", gemma4, layer="model.language_model.layers.{}"),
    "qwen2moe with a quantised router": Family("qwen2moe", "qwen2_moe", quantised_router),
    "glm4moe with multi-token prediction": Family("glm4moe", "glm4_moe", deepseek2, dense=(0,), mtp=1),
}  # fmt: skip


def random_blocks(rng: np.random.Generator, shape: Sequence[int], kind: T) -> np.ndarray:
    """Random values of a type: quantised where the gguf package can, else random blocks with finite scales."""
    if kind in QUANTISABLE:
        return gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * num_bytes), dtype=np.uint8)
    # No float16 of two such bytes, and no power of two of one, is infinite or not a number.
    return data & np.uint8(0x7B)


def write_model(
    path: Path, family: Family, *, edit: Callable[[Builder], None] | None = None, used: Any = TOP_K, **options: Any
) -> Path:
    """Write a small model of the family, with metadata of every type, and return its path (of a split one, the stem).

    Args:
        path: Where.
        family: Which.
        edit: Adds to the file before it is written.
        used: ``expert_used_count``: a number, or a list with one for each block.
        options: Of :class:`GGUFWriter` (``split_max_tensors``).
    """
    builder = Builder(path, family, **options)
    writer, total = builder.writer, BLOCKS + family.mtp
    writer.add_name("Tiny Straße")
    writer.add_block_count(total)
    writer.add_expert_count(EXPERTS)
    if isinstance(used, list):
        writer.add_array(f"{family.architecture}.expert_used_count", used)
    else:
        writer.add_expert_used_count(used)
    if family.n_group > 1:
        writer.add_expert_group_count(family.n_group)
        writer.add_expert_group_used_count(2)
    if family.mtp:
        writer.add_nextn_predict_layers(family.mtp)
    add_odd_metadata(writer)
    builder.add("token_embd.weight", (len(TOKENS), HIDDEN), T.Q4_K)
    for block in range(total):
        builder.add(f"blk.{block}.attn_norm.weight", (HIDDEN,))
        if block in family.dense:
            builder.add(f"blk.{block}.ffn_up.weight", (FF, HIDDEN), T.Q8_0)
        else:
            family.tensors(builder, block)
    if edit:
        edit(builder)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_odd_metadata(writer: GGUFWriter) -> None:
    """Entries of every type, as tokenizers and tools write them."""
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.scores", [0.5 * i for i in range(len(TOKENS))])
    writer.add_array("tokenizer.ggml.token_type", [1] * 5000)  # longer than what is decoded
    writer.add_array("odd.nested", [[1, 2, 3], [4, 5, 6]])
    writer.add_bool("odd.bool", True)
    writer.add_uint8("odd.u8", 200)
    writer.add_int8("odd.i8", -100)
    writer.add_uint16("odd.u16", 60000)
    writer.add_int16("odd.i16", -30000)
    writer.add_uint64("odd.u64", 1 << 60)
    writer.add_int64("odd.i64", -(1 << 60))
    writer.add_float32("odd.f32", 0.1)
    writer.add_float64("odd.f64", 0.1)
    writer.add_string("tokenizer.chat_template", "{{ '日本' }}\n" * 50)


def plan_for(family: Family, *, keep: int = 7, top_k: int = 2, seed: int = 5) -> Plan:
    """A plan that keeps other random experts in every layer, the same number from each group."""
    rng = np.random.default_rng(seed)
    layers = tuple(family.layer.format(block) for block in range(BLOCKS) if block not in family.dense)
    size = EXPERTS // family.n_group
    plans = []
    for layer in layers:
        ids = [
            group * size + int(i)
            for group in range(family.n_group)
            for i in rng.choice(size, keep // family.n_group, replace=False)
        ]
        plans.append(LayerPlan(layer=layer, keep=tuple(sorted(ids))))
    facts = ModelFacts(
        name="tiny", model_type=family.model_type, fingerprint="f" * 64, layers=layers, num_experts=EXPERTS,
        top_k=TOP_K, routing=Routing(n_group=family.n_group, topk_group=2 if family.n_group > 1 else 1),
    )  # fmt: skip
    return Plan(model=facts, num_experts=len(plans[0].keep), top_k=top_k, layers=tuple(plans))


def keep_of(family: Family) -> int:
    """Experts to keep: not a divisor of anything, but a multiple of the groups."""
    return 7 if family.n_group == 1 else 3 * family.n_group


def dequantised(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor as floats, experts first."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def entries(reader: GGUFReader) -> dict[str, tuple[Any, Any]]:
    """Every metadata entry: its types and its value."""
    return {
        name: (field.types, field.contents()) for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }
