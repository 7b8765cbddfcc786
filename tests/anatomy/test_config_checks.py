"""Old, doubled and foreign spellings in config.json: read as they are meant, or refused where readers would differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from moeprune.anatomy.config_checks import check_spellings
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.inspect import inspect_model
from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.skeleton import load_config
from moeprune.checkpoint.classes import SAME_ARCHITECTURE, known_as
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from tests.anatomy.published import MODELS, config_of
from tests.models import save
from tests.pruning import edit_config, plan_for


def write(folder: Path, **config: Any) -> Path:
    """A folder with a config.json alone."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


QWEN = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4}


# Two names, one number


@pytest.mark.parametrize("names", [("num_experts",), ("num_local_experts",), ("num_local_experts", "num_experts")])
def test_a_count_is_read_under_any_of_its_names(tmp_path, names):
    config = load_config(write(tmp_path, **QWEN, **dict.fromkeys(names, 24)))
    assert derive_anatomy(config).num_experts.value == 24


def test_transformers_takes_one_of_two_contradicting_counts_without_a_word(tmp_path):
    write(tmp_path, **QWEN, num_experts=45, num_local_experts=128)
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 128


def test_contradicting_counts_are_refused(tmp_path):
    write(tmp_path, **QWEN, num_experts=45, num_local_experts=128)
    with pytest.raises(CheckpointError) as error:
        load_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: num_experts = 45 and num_local_experts = 128 contradict each other: both are the "
        "number of experts, and readers differ in which they take. Keep the one that the weights were trained with."
    )


def test_contradicting_top_k_is_refused_where_transformers_knows_one_name_only(tmp_path):
    write(tmp_path, **config_of("gpt-oss-20b") | {"experts_per_token": 2})
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok = 4 and experts_per_token = 2 contradict"):
        load_config(tmp_path)


def test_contradictions_inside_a_text_config_are_found(tmp_path):
    config = config_of("Llama-4-Scout-17B-16E")
    config["text_config"]["num_experts"] = 8
    with pytest.raises(CheckpointError, match=r"text_config\.num_experts = 8 and text_config\.num_local_experts = 16"):
        load_config(write(tmp_path, **config))


def test_counts_of_different_parts_do_not_contradict_each_other(tmp_path):
    config = config_of("Llama-4-Scout-17B-16E")
    check_spellings(config | {"vision_config": {"num_local_experts": 4}}, tmp_path)


@pytest.mark.parametrize("value", [0, None, True, [8, 8], "8"])
def test_what_is_not_a_count_does_not_contradict_one(tmp_path, value):
    check_spellings({"num_experts": 8, "num_local_experts": value}, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_no_published_config_contradicts_itself(tmp_path, name):
    check_spellings(config_of(name), tmp_path)


# Rotary embedding


def test_rope_theta_beside_equal_rope_parameters(tmp_path):
    config: Any = load_config(write(tmp_path, **QWEN, rope_theta=5e5, rope_parameters={"rope_theta": 500000}))
    assert config.rope_parameters["rope_theta"] == 5e5


def test_rope_theta_beside_other_rope_parameters_is_refused(tmp_path):
    write(tmp_path, **QWEN, rope_theta=5e5, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    with pytest.raises(
        CheckpointError, match=re.escape("rope_theta = 500000.0 and rope_parameters.rope_theta = 10000.0")
    ):
        load_config(tmp_path)


def test_rope_parameters_for_each_kind_of_layer_are_left_alone(tmp_path):
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    check_spellings({"rope_theta": 5e5, "rope_parameters": by_kind}, tmp_path)


# Model types that transformers knows under another name


@pytest.mark.parametrize(("names", "known"), SAME_ARCHITECTURE.items())
def test_the_class_a_config_names_is_of_the_type_it_is_read_as(names, known):
    cls = getattr(transformers, names[1])
    assert cls.config_class is type(transformers.CONFIG_MAPPING[known]())
    assert names[0] != known


def test_kimi_k2_is_read_as_the_architecture_it_names(tmp_path):
    found = inspect_model(write(tmp_path, **config_of("Kimi-K2-Instruct")))
    assert (found["model_type"], found["architecture"]) == ("deepseek_v3", "DeepseekV3ForCausalLM")
    assert (found["num_experts"], found["top_k"], found["shared_experts"]) == (384, 8, 1)
    config: Any = load_config(tmp_path)
    assert config.rope_parameters["rope_theta"] == 50000
    assert config.rope_parameters["factor"] == 32


def test_an_alias_says_the_same_as_the_name_it_stands_for(tmp_path):
    config = config_of("Kimi-K2-Instruct")
    alias = load_config(write(tmp_path, **config))
    plain = load_config(write(tmp_path, **config | {"model_type": "deepseek_v3"}))
    assert alias.to_dict() | {"_name_or_path": str(tmp_path)} == plain.to_dict()


def test_minimax_m2_under_the_name_of_an_older_model(tmp_path):
    config = load_config(write(tmp_path, **config_of("MiniMax-M2") | {"model_type": "minimax"}))
    assert config.model_type == "minimax_m2"
    write(tmp_path, model_type="minimax", architectures=["MiniMaxForCausalLM"])
    assert load_config(tmp_path).model_type == "minimax"


def test_a_foreign_type_is_not_guessed_from_its_class_name(tmp_path):
    write(tmp_path, **config_of("Kimi-K2-Instruct") | {"model_type": "kimi_k9"})
    with pytest.raises(UnsupportedModelError, match=r"model type 'kimi_k9' is unknown to the installed transformers\."):
        load_config(tmp_path)


@pytest.mark.parametrize("architectures", [None, [], "DeepseekV3ForCausalLM", {}, [3]])
def test_architectures_of_no_use(architectures):
    assert known_as({"model_type": "kimi_k2", "architectures": architectures}) is None


def test_an_exported_config_keeps_the_foreign_type(tmp_path):
    folder = save("deepseek_v3", tmp_path / "source")
    edit_config(folder, model_type="kimi_k2", topk_method="noaux_tc")
    plan = plan_for(folder, "deepseek_v3")
    pruned = tmp_path / "pruned"
    export_checkpoint(folder, plan=plan, out=pruned, quiet=True)
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((pruned / "config.json").read_text())
    counts = {"n_routed_experts": plan.num_experts, "num_experts_per_tok": plan.top_k}
    assert {key: after[key] for key in before} == before | counts
    assert after.keys() - before.keys() <= {"num_experts", "num_local_experts"}
    assert all(check.passed for check in verify_checkpoint(pruned, against=folder, plan=plan, quiet=True))


# A top-k for every layer


def test_a_list_of_equal_top_k_is_one_number_and_stays_a_list(tmp_path):
    raw = config_of("Hunyuan-A13B")
    anatomy = derive_anatomy(load_config(write(tmp_path, **raw)))
    assert anatomy.top_k.value == 8
    pruned = prune_config_json(raw, anatomy, num_experts=48, top_k=6)
    assert pruned["moe_topk"] == [6] * 32, "converters to GGUF read it as a list"
    assert pruned["num_experts"] == 48
    again = derive_anatomy(load_config(write(tmp_path, **pruned)))
    assert (again.num_experts.value, again.top_k.value) == (48, 6)


def test_another_top_k_for_some_layers_is_refused(tmp_path):
    write(tmp_path, **config_of("Hunyuan-A13B") | {"moe_topk": [8] * 31 + [4]})
    with pytest.raises(UnsupportedModelError, match=r"no one number of active experts .* \(moe_topk lists \[4, 8\]\)"):
        derive_anatomy(load_config(tmp_path))
