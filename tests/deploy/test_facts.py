"""What is read from a config.json and from a plan, and what is left open."""

from __future__ import annotations

import pytest

from moeprune.deploy.facts import facts_of_config, facts_of_model
from moeprune.deploy.quantisation import Quantisation, read_quantisation
from moeprune.deploy.serving import Serving, servings
from moeprune.errors import DeployError, UnsupportedModelError
from tests.fake_stats import facts


def test_a_plan_gives_counts_and_routing_and_no_config():
    model = facts(num_experts=64, top_k=6, n_group=8, topk_group=3, group_score="max", renormalised=False)
    found = facts_of_model(model, num_experts=48, top_k=4)
    assert (found.num_experts, found.top_k, found.n_group, found.topk_group, found.most) == (48, 4, 8, 3, 64)
    assert (found.scoring, found.renormalised, found.bias, found.group_score) == ("softmax", False, "none", "max")
    assert (found.config, found.expert_width, found.quantisation) == (None, None, None)
    ungrouped = facts_of_model(model, n_group=1)
    assert (ungrouped.n_group, ungrouped.topk_group, ungrouped.num_experts) == (1, 1, 64)


def test_a_router_that_could_not_be_probed_is_unknown():
    assert facts_of_model(facts(scoring="unknown", renormalised=None)).scoring is None


@pytest.mark.parametrize(
    "raw",
    [
        {"text_config": {"model_type": "inner", "num_experts": 12, "num_experts_per_tok": 3}, "model_type": "outer"},
        {"model_type": "inner", "ffn_config": {"moe_num_experts": 12, "moe_top_k": 3}},
        {"model_type": "inner", "num_local_experts": 12, "num_experts_per_tok": 3},
        {"model_type": "inner", "n_routed_experts": 12, "experts_per_token": 3},
        {"model_type": "o", "thinker": {"text_config": {"model_type": "inner", "num_experts": 12, "moe_k": 3}}},
    ],
)
def test_counts_are_found_wherever_the_config_keeps_them(raw):
    found = facts_of_config(raw)
    assert (found.model_type, found.num_experts, found.top_k, found.n_group) == ("inner", 12, 3, 1)
    assert (found.scoring, found.bias, found.group_score) == (None, None, None)


def test_what_the_model_says_about_its_router_goes_before_what_the_config_says():
    raw = {
        "model_type": "deepseek_v2",
        "n_routed_experts": 12,
        "n_group": 3,
        "topk_group": 2,
        "scoring_func": "sigmoid",
    }
    known = facts_of_config(raw, model=facts(group_score="max"))
    assert (known.scoring, known.group_score, known.bias, known.n_group) == ("softmax", "max", "none", 3)
    assert facts_of_config(raw).scoring == "sigmoid"


def test_groups_that_only_the_config_class_knows_are_taken_from_the_model():
    raw = {"model_type": "deepseek_v3", "n_routed_experts": 16}
    assert facts_of_config(raw).n_group == 1
    assert facts_of_config(raw, model=facts(n_group=8, topk_group=4)).n_group == 8


def test_one_number_for_every_layer_is_that_number():
    """Hunyuan writes [8, 8, ...]."""
    found = facts_of_config({"num_experts": 64, "moe_topk": [8, 8], "moe_intermediate_size": [3072, 3072]})
    assert (found.top_k, found.expert_width) == (8, 3072)
    assert facts_of_config({"num_experts": 64, "moe_topk": [8, 6]}).top_k is None


def test_the_width_of_an_expert_is_not_that_of_a_dense_layer():
    assert (
        facts_of_config({"num_experts": 8, "moe_intermediate_size": 768, "intermediate_size": 6144}).expert_width == 768
    )
    assert facts_of_config({"num_experts": 8, "intermediate_size": 6144}).expert_width == 6144


def test_another_number_of_experts_is_written_under_every_name():
    found = facts_of_config({"num_experts": 64, "num_local_experts": 64, "n_group": 64}).with_experts(48)
    assert found.config is not None
    assert (found.num_experts, found.config["num_experts"], found.config["num_local_experts"]) == (48, 48, 48)
    assert found.config["n_group"] == 64


def test_what_a_plan_leaves_is_what_the_exporter_writes():
    raw = {
        "model_type": "deepseek_v2", "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2,
        "topk_method": "group_limited_greedy", "moe_intermediate_size": 24,
    }  # fmt: skip
    left = facts_of_config(raw).pruned(num_experts=7, top_k=2, n_group=1)
    written = facts_of_config(
        raw | {"n_routed_experts": 7, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        model=facts(scoring="unknown", renormalised=None, group_score="max"),
    )
    for name in ("num_experts", "top_k", "n_group", "topk_group", "config", "expert_width"):
        assert getattr(left, name) == getattr(written, name), name
    assert facts_of_config(raw).pruned(num_experts=9, top_k=3).n_group == 3


def test_a_dense_model():
    with pytest.raises(UnsupportedModelError, match="no number of experts"):
        facts_of_config({"model_type": "llama", "intermediate_size": 100})


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {}}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Quantisation("none", "none")),
        ({}, Quantisation("none", "none")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Quantisation("fp8", "fp8", block=(128, 128))),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Quantisation("gptq", "int4", group=128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Quantisation("gptq", "int8")),
        ({"quant_method": "mxfp4"}, Quantisation("mxfp4", "other")),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
            Quantisation("compressed-tensors", "int4", group=32),
        ),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
            Quantisation("compressed-tensors", "fp8"),
        ),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}},
            Quantisation("compressed-tensors", "other", group=16),
        ),
    ],
)
def test_how_experts_are_stored(config, expected):
    assert read_quantisation(config) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "vlm"}, "unknown engine 'vlm'. Did you mean 'vllm'?"),
        ({"engine": "vllm", "gpu": "h10"}, "unknown --gpu 'h10'. Did you mean"),
        ({"engine": "vllm", "tp": 0}, "--tp 0: expected a whole number from 1."),
        ({"engine": "vllm", "redundant": -1}, "--redundant -1: expected a whole number from 0."),
    ],
)
def test_refused_servings(arguments, message):
    with pytest.raises(DeployError) as error:
        Serving(**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("engine", "tp", "ep", "shards"),
    [("vllm", 8, 1, 8), ("vllm", 8, 8, 1), ("sglang", 8, 1, 8), ("sglang", 8, 2, 4), ("sglang", 8, 8, 1)],
)
def test_into_how_many_slices_an_expert_is_cut(engine, tp, ep, shards):
    (serving,) = servings([engine, engine], tp=tp, ep=ep)
    assert serving.width_shards == shards


def test_a_width_for_each_tower_is_not_replaced_by_that_of_the_dense_layers():
    raw = {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [64, 64], "intermediate_size": 12288}
    assert facts_of_config(raw | {"moe_intermediate_size": [1536, 512]}).expert_width is None
    assert facts_of_config(raw | {"moe_intermediate_size": [1536, 1536]}).expert_width == 1536
