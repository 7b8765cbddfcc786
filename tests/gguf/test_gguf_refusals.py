"""Files and plans that cannot be pruned are refused before anything is written, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter

from moeprune.errors import CheckpointError, MoePruneError, PlanError, UnsupportedModelError
from moeprune.facts import Routing
from moeprune.gguf.export import export_gguf
from moeprune.gguf.header import GgufTensor
from moeprune.gguf.roles import expert_roles
from moeprune.gguf.types import ggml_types
from moeprune.plan.plan import LayerPlan, Plan
from tests.gguf.files import BLOCKS, EXPERTS, FAMILIES, FF, HIDDEN, TOP_K, Builder, plan_for, write_model

QWEN = FAMILIES["qwen3moe"]


def refused(source: Path, plan: Plan, error: type[MoePruneError], match: str) -> None:
    """The export fails with that error and leaves the folder as it was."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error, match=match):
        export_gguf(source, plan=plan, out=source.parent / "out.gguf", quiet=True)
    assert sorted(source.parent.iterdir()) == before


UNKNOWN: dict[str, tuple[Callable[[Builder], None], str]] = {
    "a tensor of experts with an unknown suffix": (
        lambda b: b.add("blk.0.ffn_gate_exps.zeros", (EXPERTS, 8)),
        r"'blk\.0\.ffn_gate_exps\.zeros' \[8, 12\] may depend on experts",
    ),
    "an adapter": (
        lambda b: b.add("blk.0.ffn_up_exps.weight.lora_a", (EXPERTS, 4, HIDDEN)),
        "lora_a.* may depend on experts",
    ),
    "an unknown feed-forward tensor with as many entries as experts": (
        lambda b: b.add("blk.0.ffn_mystery.weight", (EXPERTS,)),
        r"ffn_mystery.* may depend on experts",
    ),
    "a router outside the blocks": (
        lambda b: b.add("router_bias", (EXPERTS,)),
        "router_bias.* may depend on experts",
    ),
    "chunk experts": (
        lambda b: b.add("blk.0.ffn_up_chexps.weight", (EXPERTS // 2, FF, HIDDEN)),
        r"ffn_up_chexps.* may depend on experts: chunk experts, several routed experts to one \(GroveMoE\)",
    ),
    "hash routing": (
        lambda b: b.writer.add_tensor("blk.0.ffn_gate_tid2eid.weight", np.zeros((97, 3), np.int32)),
        r"tid2eid.* may depend on experts: expert ids by token \(hash routing\)",
    ),
    "experts along another dimension": (
        lambda b: b.add("blk.0.ffn_extra_exps.weight", (FF, EXPERTS, HIDDEN)),
        r"'blk\.0\.ffn_extra_exps\.weight' has dimensions \[256, 12, 512\], expected 3 of which the last is the 12",
    ),
    "experts without a router": (
        lambda b: b.add("blk.1.ffn_up_exps.weight", (EXPERTS, FF, HIDDEN)),
        r"block 1 has experts but no ffn_gate_inp\.weight",
    ),
    "a router without experts": (
        lambda b: b.router(1),
        r"block 1 has ffn_gate_inp\.weight but no experts",
    ),
    "one expert of several": (
        lambda b: b.add("blk.0.ffn_up.3.weight", (FF, HIDDEN)),
        r"blk\.0\.ffn_up\.\*\.weight: 1 experts are stored, expected 12",
    ),
    "an expert too many": (
        lambda b: b.add("blk.0.ffn_up.12.weight", (FF, HIDDEN)),
        r"'blk\.0\.ffn_up\.12\.weight' is expert 12 of 12",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_is_refused_by_name(name: str, tmp_path: Path) -> None:
    edit, match = UNKNOWN[name]
    refused(write_model(tmp_path / "source.gguf", QWEN, edit=edit), plan_for(QWEN), UnsupportedModelError, match)


def test_experts_that_share_a_quantised_block_are_refused() -> None:
    bias = GgufTensor("blk.0.exp_probs_b.bias", (64,), ggml_types()[T.Q8_0], Path("model.gguf"), 0, 68)
    with pytest.raises(UnsupportedModelError, match="is Q8_0: 32 experts share a block"):
        expert_roles({bias.name: bias}, num_experts=64)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "source.gguf", plan_for(QWEN), UnsupportedModelError, "a dense model .llama, expert_count 0.")


def test_a_file_that_is_not_a_language_model_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, edit=lambda b: b.writer.add_type("adapter"))
    refused(source, plan_for(QWEN), UnsupportedModelError, "of type 'adapter'")


def test_an_expert_count_that_the_tensors_deny_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, edit=lambda b: b.writer.add_expert_count(EXPERTS + 1))
    refused(source, plan_for(QWEN), UnsupportedModelError, "expected 2 of which the last is the 13 experts")


def test_an_expert_count_without_experts_is_refused(tmp_path: Path) -> None:
    family = dataclasses.replace(QWEN, dense=(0, 1, 2))
    source = write_model(tmp_path / "source.gguf", family)
    refused(source, plan_for(QWEN), CheckpointError, r"the tensors have experts in blocks \[\]")


@pytest.mark.parametrize("used", [0, [0, 0, 0], [1, -1, 1]])
def test_no_active_experts_are_refused(used: object, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, used=used)
    refused(source, plan_for(QWEN), CheckpointError, "expected the number of active experts")


def changed(plan: Plan, **facts: object) -> Plan:
    return plan.model_copy(update={"model": plan.model.model_copy(update=facts)})


def test_a_plan_of_another_architecture_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    plan = changed(plan_for(QWEN), model_type="mixtral")
    refused(source, plan, PlanError, r"qwen3moe; the plan is for tiny \(mixtral\), which llama.cpp calls llama")


def test_a_plan_with_other_layers_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    other = dataclasses.replace(QWEN, dense=(0,))
    refused(source, plan_for(other), PlanError, r"experts in blocks \(0, 2\); the plan is for tiny with \(1, 2\)")


def test_a_plan_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    refused(
        source, changed(plan_for(QWEN), num_experts=16), PlanError, "experts a block 12; the plan is for tiny with 16"
    )


def test_another_top_k_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, used=TOP_K + 1)
    plan = plan_for(QWEN)
    refused(source, plan, PlanError, "4 active experts; the plan is for tiny with 3.* change model.top_k in the plan")
    export_gguf(source, plan=changed(plan, top_k=TOP_K + 1), out=tmp_path / "out.gguf", quiet=True)


def test_blocks_with_different_top_k_are_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, used=[2, 0, 3])
    refused(source, plan_for(QWEN), PlanError, "2 or 3 active experts")


def test_other_groups_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["deepseek2"]
    source = write_model(tmp_path / "source.gguf", family)
    other = dataclasses.replace(family, n_group=2)
    refused(source, plan_for(other, keep=8), PlanError, "expert_group_count 3; the plan is for tiny with 2")
    plan = changed(plan_for(family, keep=9), routing=Routing(n_group=3, topk_group=1))
    refused(source, plan, PlanError, "expert_group_used_count 2; the plan is for tiny with 1")


def test_a_file_from_before_group_limited_routing_takes_a_plan_with_groups(tmp_path: Path) -> None:
    family = FAMILIES["deepseek2"]
    source = write_model(tmp_path / "source.gguf", dataclasses.replace(family, n_group=1))
    export_gguf(source, plan=plan_for(family, keep=9), out=tmp_path / "out.gguf", quiet=True)


def test_one_expert_is_refused_because_llama_cpp_calls_that_dense(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    refused(source, plan_for(QWEN, keep=1, top_k=1), PlanError, "Keep at least 2")


def test_a_plan_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    plan = plan_for(QWEN)
    broken = plan.model_copy(update={"layers": (LayerPlan(layer="model.layers.0", keep=(0, 1)), *plan.layers[1:])})
    refused(source, broken, PlanError, "keeps 2 experts, the plan says 7")


def test_a_layer_without_a_number_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    plan = plan_for(dataclasses.replace(QWEN, layer="model.layers.{}.x"))
    refused(source, plan, PlanError, r"ends in its number, as in model\.layers\.3")


def test_expert_tensors_beyond_the_last_block_are_refused(tmp_path: Path) -> None:
    def edit(builder: Builder) -> None:
        builder.router(BLOCKS)
        builder.experts(BLOCKS)

    source = write_model(tmp_path / "source.gguf", QWEN, edit=edit)
    refused(
        source, plan_for(QWEN), CheckpointError, r"block_count 3, but the tensors have experts in blocks \[0, 2, 3\]"
    )


def test_a_plan_that_drops_multi_token_prediction_is_refused_where_the_file_has_it(tmp_path: Path) -> None:
    family = FAMILIES["glm4moe with multi-token prediction"]
    source = write_model(tmp_path / "source.gguf", family)
    plan = plan_for(family).model_copy(update={"mtp": "drop"})
    refused(source, plan, PlanError, "Set mtp to prune in the plan")
