"""The derived anatomy of every family, against a table written by hand from the modeling code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers

from moeprune.anatomy.anatomy import MoeLayer
from moeprune.anatomy.axes import decoder_layer_of
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.names import ConfigField, find_field, groups_of
from moeprune.anatomy.pruned_config import prune_config, prune_config_json
from moeprune.anatomy.skeleton import load_config, model_class
from moeprune.anatomy.tiny import tiny_config
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.facts import Routing
from tests.models import COMMON, FAMILIES, build, save

ROUTER = {"mlp.gate.weight": 0}
CORRECTED = {"mlp.gate.weight": 0, "mlp.gate.e_score_correction_bias": 0}
EXPERTS = {"mlp.experts.gate_up_proj": 0, "mlp.experts.down_proj": 0}


@dataclass(frozen=True)
class Expected:
    architecture: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    count_names: set[str]
    axes: dict[str, int]
    routing: Routing
    described: str
    router: str = "mlp.gate"


EXPECTED = {
    "qwen3_moe": Expected(
        "Qwen3MoeForCausalLM", (0, 2), 10, 3, {"num_experts", "num_local_experts"}, ROUTER | EXPERTS,
        Routing(scoring="softmax", renormalised=True, scale=1, bias="none"), "softmax over the top-k",
    ),
    "qwen2_moe": Expected(
        "Qwen2MoeForCausalLM", (0, 1), 10, 3, {"num_experts"}, ROUTER | EXPERTS,
        Routing(scoring="softmax", renormalised=False, scale=1, bias="none"), "softmax before top-k, not renormalised",
    ),
    "mixtral": Expected(
        "MixtralForCausalLM", (0, 1), 6, 2, {"num_experts", "num_local_experts"}, ROUTER | EXPERTS,
        Routing(scoring="softmax", renormalised=True, scale=1, bias="none"), "softmax over the top-k",
    ),
    "olmoe": Expected(
        "OlmoeForCausalLM", (0, 1), 10, 3, {"num_experts", "num_local_experts"}, ROUTER | EXPERTS,
        Routing(scoring="softmax", renormalised=False, scale=1, bias="none"), "softmax before top-k, not renormalised",
    ),
    "deepseek_v2": Expected(
        "DeepseekV2ForCausalLM", (1, 2), 12, 3, {"n_routed_experts", "num_experts"}, ROUTER | EXPERTS,
        Routing(scoring="softmax", renormalised=False, scale=1.5, n_group=3, topk_group=2, group_score="max"),
        "softmax before top-k, not renormalised, 2 of 3 groups, weights x 1.5",
    ),
    "deepseek_v3": Expected(
        "DeepseekV3ForCausalLM", (1, 2), 16, 3, {"n_routed_experts", "num_local_experts"}, CORRECTED | EXPERTS,
        Routing(scoring="sigmoid", renormalised=True, scale=2.5, bias="correction", n_group=4, topk_group=2),
        "sigmoid, renormalised, correction bias, 2 of 4 groups, weights x 2.5",
    ),
    "glm4_moe": Expected(
        "Glm4MoeForCausalLM", (1, 2), 10, 3, {"n_routed_experts", "num_local_experts"}, CORRECTED | EXPERTS,
        Routing(scoring="sigmoid", renormalised=True, scale=1, bias="correction"),
        "sigmoid, renormalised, correction bias",
    ),
    "gpt_oss": Expected(
        "GptOssForCausalLM", (0, 1), 10, 3, {"num_experts", "num_local_experts"},
        {"mlp.router.weight": 0, "mlp.router.bias": 0} | EXPERTS
        | {"mlp.experts.gate_up_proj_bias": 0, "mlp.experts.down_proj_bias": 0},
        Routing(scoring="softmax", renormalised=True, scale=1, bias="router"), "softmax over the top-k, router bias",
        router="mlp.router",
    ),
}  # fmt: skip


def test_every_tiny_family_has_an_expectation():
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_axes_and_counts(family):
    expected, anatomy = EXPECTED[family], derive_anatomy(FAMILIES[family]())
    assert type(anatomy.skeleton).__name__ == expected.architecture
    assert anatomy.layers == tuple(
        MoeLayer(f"model.layers.{i}", f"model.layers.{i}.mlp.experts", f"model.layers.{i}.{expected.router}")
        for i in expected.layers
    )
    assert {name: (axis.layer, axis.dim) for name, axis in anatomy.axes.items()} == {
        f"model.layers.{i}.{name}": (f"model.layers.{i}", dim)
        for i in expected.layers
        for name, dim in expected.axes.items()
    }
    assert all(axis.name == name for name, axis in anatomy.axes.items())
    assert (anatomy.num_experts.value, anatomy.top_k.value) == (expected.experts, expected.top_k)
    assert all(tensor.is_meta for tensor in anatomy.skeleton.state_dict().values()), "deriving must need no memory"


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_what_the_modeling_code_does(family):
    expected, routing = EXPECTED[family], derive_anatomy(FAMILIES[family]()).routing
    assert routing.model_dump(exclude={"scale"}) == expected.routing.model_dump(exclude={"scale"})
    assert routing.scale == pytest.approx(expected.routing.scale, rel=1e-3)
    assert routing.describe() == expected.described


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_have_all_names_that_readers_of_the_config_use(family):
    anatomy = derive_anatomy(FAMILIES[family]())
    assert set(anatomy.num_experts.aliases) == EXPECTED[family].count_names
    assert anatomy.num_experts.name in anatomy.num_experts.aliases
    assert anatomy.top_k.aliases == ("num_experts_per_tok",)
    for alias in (*anatomy.num_experts.aliases, *anatomy.top_k.aliases):
        assert hasattr(anatomy.config, alias)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_carry_what_plans_need(family):
    expected, anatomy = EXPECTED[family], derive_anatomy(FAMILIES[family]())
    facts = anatomy.facts(name="n", fingerprint="f")
    assert (facts.name, facts.fingerprint, facts.model_type) == ("n", "f", family)
    assert facts.layers == tuple(f"model.layers.{i}" for i in expected.layers)
    assert (facts.num_experts, facts.top_k, facts.routing) == (expected.experts, expected.top_k, anatomy.routing)


@pytest.mark.parametrize("norm", [True, False])
def test_norm_topk_prob_is_seen_by_running_the_router_not_by_the_family(norm):
    config = FAMILIES["qwen3_moe"]()
    config.norm_topk_prob = norm
    assert derive_anatomy(config).routing.renormalised is norm


def test_the_scale_of_the_weights_is_measured():
    config = FAMILIES["glm4_moe"]()
    config.routed_scaling_factor = 1.75
    assert derive_anatomy(config).routing.scale == pytest.approx(1.75, rel=1e-3)


def test_greedy_deepseek_v2_is_not_limited_to_groups():
    """The Lite checkpoints carry n_group in their config although their routing does not use it."""
    config = FAMILIES["deepseek_v2"]()
    config.topk_method, config.n_group, config.topk_group = "greedy", 3, 2
    assert groups_of(config) == (1, 1)
    assert derive_anatomy(config).routing.n_group == 1


def test_groups_that_the_class_does_not_know_are_no_groups():
    """transformers keeps unknown keys of config.json; a Qwen3-MoE does not route in groups because of one."""
    config = FAMILIES["qwen3_moe"]()
    config.n_group, config.topk_group = 5, 2
    assert derive_anatomy(config).routing.n_group == 1
    grouped = derive_anatomy(tiny_config(transformers.BailingHybridConfig)).routing
    assert (grouped.n_group, grouped.topk_group) == (3, 2), "declared as n_group, read as num_expert_group"


def test_deriving_leaves_the_config_as_it_was():
    config = FAMILIES["deepseek_v3"]()
    before = config.to_dict()
    derive_anatomy(config)
    assert config.to_dict() == before


def test_deriving_does_not_disturb_the_random_numbers_of_the_caller():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    derive_anatomy(FAMILIES["mixtral"]())
    assert torch.equal(torch.rand(2), expected)


# Models that cannot be pruned


def test_a_dense_model():
    config = transformers.Qwen3Config(**COMMON, num_hidden_layers=2, intermediate_size=44)
    with pytest.raises(UnsupportedModelError) as error:
        derive_anatomy(config)
    assert str(error.value) == (
        "qwen3: not a Mixture-of-Experts model (its config: none of "
        "num_experts, num_local_experts, n_routed_experts, moe_num_experts)."
    )


def test_a_moe_config_whose_layers_are_all_dense():
    config = FAMILIES["qwen3_moe"]()
    config.mlp_only_layers = [0, 1, 2]
    with pytest.raises(UnsupportedModelError) as error:
        derive_anatomy(config)
    assert str(error.value) == ("qwen3_moe: no tensor depends on num_local_experts (= 10), so there are no experts.")


def test_an_encoder_decoder_model():
    config = transformers.SwitchTransformersConfig(d_model=16, d_ff=20, num_layers=2, num_decoder_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"^switch_transformers: "):
        derive_anatomy(config)


def test_an_unknown_model_type_names_a_close_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moee"}')
    with pytest.raises(UnsupportedModelError) as error:
        load_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: model type 'qwen3_moee' is unknown to the installed transformers. Did you mean 'qwen3_moe'? "
        "Update transformers; models that need remote code are not supported."
    )


def test_an_unknown_model_type_like_no_other(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "zzzzzzzzz"}')
    with pytest.raises(UnsupportedModelError) as error:
        load_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: model type 'zzzzzzzzz' is unknown to the installed transformers. "
        "Update transformers; models that need remote code are not supported."
    )


@pytest.mark.parametrize("text", ["{}", '{"model_type": 3}'])
def test_a_config_without_a_model_type(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError) as error:
        load_config(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: no model_type, so the architecture is unknown."


def test_a_config_with_values_of_the_wrong_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "hidden_size": "wide"}')
    with pytest.raises(CheckpointError) as error:
        load_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: refused by transformers: ")


def test_the_class_is_the_one_the_config_names():
    config = FAMILIES["mixtral"]()
    assert model_class(config).__name__ == "MixtralForCausalLM"
    config.architectures = ["MixtralForSequenceClassification"]
    assert model_class(config).__name__ == "MixtralForSequenceClassification"
    config.architectures = ["NoSuchClass"]
    assert model_class(config).__name__ == "MixtralForCausalLM"


def test_the_decoder_layer_is_the_element_of_the_outermost_list():
    model = build("mixtral")
    assert decoder_layer_of(model, "model.layers.1.mlp.experts.down_proj") == "model.layers.1"
    assert decoder_layer_of(model, "lm_head.weight") == ""


# The config of the pruned model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_config_builds_a_model_of_the_pruned_shape(family):
    config = FAMILIES[family]()
    anatomy = derive_anatomy(config)
    n_group = anatomy.routing.n_group
    kept = 2 * n_group if n_group > 1 else 4
    pruned = derive_anatomy(prune_config(anatomy, num_experts=kept, top_k=1))
    assert (pruned.num_experts.value, pruned.top_k.value) == (kept, 1)
    shapes = {name: tuple(t.shape) for name, t in pruned.skeleton.state_dict().items()}
    for name, tensor in anatomy.skeleton.state_dict().items():
        expected = list(tensor.shape)
        if name in anatomy.axes:
            expected[anatomy.axes[name].dim] = kept
        assert shapes[name] == tuple(expected), name
    assert anatomy.config.to_dict() == config.to_dict(), "the original config must not change"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_alias_is_written_and_every_other_key_kept_in_order(tmp_path, family):
    anatomy = derive_anatomy(load_config(save(family, tmp_path)))
    raw = {"zeta": {"b": 1, "a": [2]}, "model_type": family, anatomy.top_k.name: 3, "topk_method": "noaux_tc"}
    raw["alpha"] = None
    written = prune_config_json(raw, anatomy, num_experts=4, top_k=1)
    assert list(written)[: len(raw)] == list(raw)
    assert {key: written[key] for key in raw if key != "num_experts_per_tok"} == {
        key: value for key, value in raw.items() if key != "num_experts_per_tok"
    }
    added = written.keys() - raw.keys()
    assert added == EXPECTED[family].count_names
    assert all(written[name] == 4 for name in added)
    assert written["num_experts_per_tok"] == 1
    assert raw["num_experts_per_tok"] == 3, "the given config must not change"


def test_a_count_under_a_name_that_transformers_does_not_know_is_written_too():
    """gpt-oss checkpoints say `experts_per_token` beside `num_experts_per_tok`, and TensorRT-LLM reads the former."""
    anatomy = derive_anatomy(FAMILIES["gpt_oss"]())
    raw = {"experts_per_token": 3, "num_experts_per_tok": 3, "num_local_experts": 10, "moe_k": 99}
    written = prune_config_json(raw, anatomy, num_experts=7, top_k=2)
    assert (written["experts_per_token"], written["num_experts_per_tok"], written["num_local_experts"]) == (2, 2, 7)
    assert written["moe_k"] == 99, "a number that never was the top-k means something else"


def test_the_config_of_the_language_model_inside_a_larger_one_is_written():
    text = FAMILIES["qwen3_moe"]().to_dict()
    field = ConfigField(("text_config",), "num_experts", ("num_experts", "num_local_experts"), 10)
    config = {"model_type": "outer", "num_experts": "untouched", "text_config": text}
    field.write(config, 4)
    assert config["num_experts"] == "untouched"
    assert (config["text_config"]["num_experts"], config["text_config"]["num_local_experts"]) == (4, 4)


def test_fields_are_found_in_a_nested_text_config():
    text = dict(**COMMON, num_hidden_layers=2, num_experts=10, num_experts_per_tok=3)
    config = transformers.Qwen3VLMoeConfig(text_config=text)
    field = find_field(config, ("num_experts", "num_local_experts"))
    assert field is not None
    assert (field.path, field.value) == (("text_config",), 10)


@pytest.mark.parametrize("value", [None, 0, -1, True, 2.5, "8"])
def test_a_value_that_is_no_count_is_not_found(value):
    config = transformers.Qwen3Config(**COMMON)
    config.num_experts = value
    assert find_field(config, ("num_experts",)) is None
