import json
import time

import pytest

from moeprune.anatomy.formats import FORMATS
from moeprune.errors import UnsupportedModelError
from moeprune.export.expert_names import ExpertNames, numbers_of
from moeprune.export.quantization_config import (
    remap_quantization_config,
    remap_quantization_file,
    stored_modules,
)

EXPERTS = 20
KEEP = {"model.layers.0": (1, 2, 17), "model.layers.4": (0, 5, 19)}
MODULES = [
    f"{layer}.mlp.experts.{expert}.{projection}"
    for layer in KEEP
    for expert in range(EXPERTS)
    for projection in ("gate_proj", "up_proj", "down_proj")
]


def names(keep=KEEP, *, num_experts=EXPERTS, modules=MODULES, dropped=()):
    left_out = dict.fromkeys(dropped, ())
    return ExpertNames(numbers_of(keep | left_out, num_experts=num_experts), modules=modules)


def remap(entry, **kwargs):
    return remap_quantization_config({"quantization_config": entry}, names(**kwargs))["quantization_config"]


@pytest.mark.parametrize(
    "key",
    ["modules_to_not_convert", "ignored_layers", "ignore", "modules_to_not_quantize", "llm_int8_skip_modules",
     "exclude_modules", "exclude", "a_key_of_next_year"],
)  # fmt: skip
def test_single_experts_are_dropped_or_renumbered_by_layer_whatever_the_list_is_called(key):
    before = ["lm_head", "model.layers.0.mlp.experts.17.up_proj", "model.layers.4.mlp.experts.17.up_proj",
              "model.layers.4.mlp.experts.19.down_proj", "model.layers.0.mlp.experts.3", "model.layers.4.mlp.experts.5",
              "model.layers.4.mlp.gate"]  # fmt: skip
    after = ["lm_head", "model.layers.0.mlp.experts.2.up_proj", "model.layers.4.mlp.experts.2.down_proj",
             "model.layers.4.mlp.experts.1", "model.layers.4.mlp.gate"]  # fmt: skip
    assert remap({key: before}) == {key: after}


@pytest.mark.parametrize(
    "prefix",
    ["model.layers", "model.language_model.layers", "language_model.model.layers", "layers", "backbone.layers"],
)
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe", "feed_forward", "mixer", "moe.inner"])
def test_layers_are_known_by_any_of_their_prefixes(prefix, block):
    entries = [f"{prefix}.4.{block}.experts.{expert}.w1" for expert in (5, 6)]
    assert remap({"ignore": entries}) == {"ignore": [f"{prefix}.4.{block}.experts.1.w1"]}


def test_the_paths_of_a_multimodal_model_are_known_by_the_short_prefix():
    keep = {"model.language_model.layers.4": (0, 5, 19)}
    entry = {"ignore": ["model.layers.4.mlp.experts.5.up_proj"]}
    assert remap(entry, keep=keep, modules=()) == {"ignore": ["model.layers.4.mlp.experts.1.up_proj"]}


def test_quantized_layers_of_a_mixed_checkpoint_are_renumbered_with_their_settings():
    layer = "model.layers.0.mlp.experts"
    before = {f"{layer}.{e}.up_proj": {"quant_algo": "NVFP4", "group_size": e} for e in range(EXPERTS)}
    after = {f"{layer}.{new}.up_proj": {"quant_algo": "NVFP4", "group_size": e} for new, e in enumerate((1, 2, 17))}
    assert remap({"quantized_layers": before}) == {"quantized_layers": after}


def test_targets_of_config_groups_are_remapped_and_class_names_stay():
    before = {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
            "group_1": {"targets": ["model.layers.4.mlp.experts.19.up_proj", "model.layers.4.mlp.experts.1.up_proj"]},
        },
        "ignore": ["re:.*lm_head", "re:.*self_attn.*", "model.layers.0.mlp.experts.0.gate_proj"],
        "kv_cache_scheme": None,
    }
    assert remap(before) == {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
            "group_1": {"targets": ["model.layers.4.mlp.experts.2.up_proj"]},
        },
        "ignore": ["re:.*lm_head", "re:.*self_attn.*"],
        "kv_cache_scheme": None,
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "re:.*mlp.experts.*", r"re:.*\.experts\.\d+\.(gate|up|down)_proj$", "re:.*gate$", "re:.*mlp.gate.*",
        r"re:model\.layers\.4\..*", "*.experts.*", "*mlp.experts*", "model.layers.0*", "model.layers.4.mlp.experts*",
        "model.layers.*.self_attn", "mlp.experts", "experts", "lm_head", r".*down_proj", "*.[0-9].mlp.*",
    ],
)  # fmt: skip
def test_patterns_that_hold_for_all_experts_of_a_layer_alike_stay(pattern):
    assert remap({"ignore": [pattern]}) == {"ignore": [pattern]}
    assert remap({"extra_config": {pattern: {"bits": 8}}}) == {"extra_config": {pattern: {"bits": 8}}}


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*\.experts\.17\..*", r"re:model\.layers\.4\.mlp\.experts\.17\.up_proj", r"re:.*experts\.[0-9]\..*",
        "re:model.layers.4.mlp.experts.1", "re:model.layers.4.mlp.experts.1.*", "*.experts.17.*", "experts.17.up_proj",
        "model.layers.4.mlp.experts.1*", r".*experts\.(0|1|2)\..*", r"model.layers.4.mlp.experts.\d", "7.up_proj",
        "*.experts.1?.*", "model.layers.*.mlp.experts.3.up_proj",
    ],
)  # fmt: skip
def test_patterns_that_single_out_experts_are_refused(pattern):
    for entry in ({"ignore": [pattern]}, {"quantized_layers": {pattern: {}}}):
        with pytest.raises(UnsupportedModelError, match="quantise the result"):
            remap(entry)


def test_a_pattern_that_matches_all_experts_only_as_a_prefix_is_refused():
    """Without its end, `experts.\\d` matches experts 10 to 19 too; transformers wants the end of a name after it."""
    with pytest.raises(UnsupportedModelError, match="singles out experts"):
        remap({"modules_to_not_convert": [r"model.layers.4.mlp.experts.\d"]})


def test_the_refusal_names_the_entry_its_place_and_two_modules():
    with pytest.raises(UnsupportedModelError) as caught:
        remap({"config_groups": {"group_0": {"targets": [r"re:.*experts\.17\."]}}})
    for said in ("quantization_config.config_groups.group_0.targets", r"re:.*experts\\.17\\.",
                 "model.layers.0.mlp.experts.17.gate_proj", "model.layers.0.mlp.experts.0.gate_proj"):  # fmt: skip
        assert said in str(caught.value)


def test_gptqmodels_dynamic_patterns_that_hold_for_all_experts_stay():
    dynamic = {r"-:.*self_attn.*": {}, r"+:.*\.experts\.\d+\.down_proj": {"bits": 8}, r".*layers\.4\..*": {"bits": 8}}
    assert remap({"dynamic": dynamic}) == {"dynamic": dynamic}


def test_gptqmodels_dynamic_entries_with_the_name_of_a_module_are_renumbered():
    before = {"-:model.layers.4.mlp.experts.19.up_proj": {}, "+:model.layers.4.mlp.experts.18.up_proj": {"bits": 8}}
    assert remap({"dynamic": before}) == {"dynamic": {"-:model.layers.4.mlp.experts.2.up_proj": {}}}


@pytest.mark.parametrize("pattern", ["model.layers.4.mlp.experts.1", "-:model.layers.4.mlp.experts.1"])
def test_a_dynamic_entry_that_ends_in_a_number_is_refused_because_it_also_begins_others(pattern):
    with pytest.raises(UnsupportedModelError, match="singles out experts"):
        remap({"dynamic": {pattern: {}}})


def test_modules_in_block_stay_if_they_name_every_expert():
    before = [["self_attn.q_proj"], [f"mlp.experts.{e}.up_proj" for e in range(EXPERTS)],
              [f"mlp.experts.{EXPERTS - 1}.w2"] + [f"mlp.experts.{e}.w2" for e in range(EXPERTS - 1)]]  # fmt: skip
    after = [["self_attn.q_proj"], [f"mlp.experts.{e}.up_proj" for e in range(3)],
             [f"mlp.experts.{e}.w2" for e in range(3)]]  # fmt: skip
    assert remap({"modules_in_block_to_quantize": before}) == {"modules_in_block_to_quantize": after}


def test_modules_in_block_one_list_an_expert_lose_the_lists_of_the_last_ones():
    before = [["self_attn.q_proj"], *([f"mlp.experts.{e}.up_proj"] for e in range(EXPERTS)), []]
    after = [["self_attn.q_proj"], *([f"mlp.experts.{e}.up_proj"] for e in range(3)), []]
    assert remap({"modules_in_block_to_quantize": before}) == {"modules_in_block_to_quantize": after}


def test_modules_in_block_that_name_some_experts_are_refused():
    before = [["mlp.experts.0.up_proj", "mlp.experts.2.up_proj"]]
    with pytest.raises(UnsupportedModelError, match=r"names 2 of 20 experts .*each layer gets new numbers"):
        remap({"modules_in_block_to_quantize": before})


@pytest.mark.parametrize("expert", [2, 17, 19, 0])
def test_modelopts_short_form_of_one_expert_is_renumbered_without_widening(expert):
    """`experts.2*` matches expert 2 alone of 20, but `experts.1*` of the pruned model would match 10 to 19."""
    keep = {"model.layers.4": tuple(sorted({1, expert, 18}))}
    new = keep["model.layers.4"].index(expert)
    before = {"exclude_modules": [f"model.layers.4.mlp.experts.{expert}*"]}
    after = {"exclude_modules": [f"model.layers.4.mlp.experts.{new}.*"]}
    assert remap(before, keep=keep) == after


def test_the_layers_of_multi_token_prediction_have_numbers_of_their_own():
    entry = {"ignore": ["mtp.layers.0.mlp.experts.5.up_proj", "model.layers.0.mlp.experts.17.up_proj"]}
    with pytest.raises(UnsupportedModelError, match=r"'mtp.layers.0.mlp.experts.5.up_proj', an expert of a layer that"):
        remap(entry)
    keep = KEEP | {"mtp.layers.0": (4, 5, 6)}
    after = ["mtp.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.2.up_proj"]
    assert remap(entry, keep=keep) == {"ignore": after}
    assert remap(entry, dropped=["mtp.layers.0"]) == {"ignore": after[1:]}


def test_an_expert_that_the_model_does_not_have_is_refused():
    with pytest.raises(UnsupportedModelError, match="experts 0 to 19"):
        remap({"ignore": ["model.layers.4.mlp.experts.20.up_proj"]})


def test_one_expert_where_no_list_is_expected_is_refused():
    with pytest.raises(UnsupportedModelError, match="where a list of modules is expected"):
        remap({"block_name_to_quantize": "model.layers.4.mlp.experts.3"})


def test_patterns_are_tried_on_usual_names_where_experts_are_stored_fused():
    assert remap({"ignore": ["re:.*experts.*"]}, modules=["lm_head"]) == {"ignore": ["re:.*experts.*"]}
    with pytest.raises(UnsupportedModelError, match="singles out experts"):
        remap({"ignore": [r"re:.*experts\.3\..*"]}, modules=["lm_head"])


def test_nothing_outside_the_quantisation_entries_changes_and_the_source_stays():
    name = "model.layers.4.mlp.experts.5.up_proj"
    config = {
        "model_type": "x",
        "notes": [name],
        "quantization_config": {"ignore": [name]},
        "compression_config": {"ignore": [name]},
        "text_config": {"notes": [name], "quantization_config": {"ignore": [name], "bits": 4, "sym": True}},
    }
    before = json.dumps(config)
    new = "model.layers.4.mlp.experts.1.up_proj"
    assert remap_quantization_config(config, names()) == {
        "model_type": "x",
        "notes": [name],
        "quantization_config": {"ignore": [new]},
        "compression_config": {"ignore": [new]},
        "text_config": {"notes": [name], "quantization_config": {"ignore": [new], "bits": 4, "sym": True}},
    }
    assert json.dumps(config) == before


def test_modelopts_own_file_is_remapped():
    before = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.0*", "model.layers.4.mlp.experts.19.up_proj",
                                "model.layers.4.mlp.experts.2*"],
        },
    }  # fmt: skip
    after = json.loads(json.dumps(before))
    after["quantization"]["exclude_modules"] = ["lm_head", "model.layers.0*", "model.layers.4.mlp.experts.2.up_proj"]
    assert remap_quantization_file(before, names(), name="hf_quant_config.json") == after


def test_the_modules_of_stored_keys_are_named_once():
    keys = ["a.experts.0.up_proj.qweight", "a.experts.0.up_proj.scales", "a.norm.weight", "a.experts.gate_up_proj"]
    assert stored_modules(keys, stored=FORMATS["gptq"]) == ["a.experts.0.up_proj", "a.norm", "a.experts.gate_up_proj"]


def test_a_config_of_the_largest_models_is_remapped_within_seconds():
    """58 layers of 256 experts with an ignore list of 600 modules and 20 patterns, as DeepSeek-V3 has."""
    keep = {f"model.layers.{layer}": tuple(range(0, 256, 2)) for layer in range(3, 61)}
    modules = [
        f"{layer}.mlp.experts.{e}.{p}_proj" for layer in keep for e in range(256) for p in ("gate", "up", "down")
    ]
    ignore = [f"model.layers.{layer}.self_attn.{p}" for layer in range(60) for p in "abcdefghij"]
    ignore += [f"re:.*self_attn.{letter}.*" for letter in "abcdefghijklmnopqrst"]
    begin = time.perf_counter()
    assert remap({"ignore": ignore}, keep=keep, num_experts=256, modules=modules) == {"ignore": ignore}
    assert time.perf_counter() - begin < 30
