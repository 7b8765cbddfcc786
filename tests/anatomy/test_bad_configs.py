"""Configs that contradict themselves or the tensors beside them, each told by name before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.source import open_source
from moeprune.anatomy.tiny import tiny_config
from moeprune.errors import CheckpointError, MoePruneError, UnsupportedModelError
from tests.models import save
from tests.pruning import edit_config, edit_tensors


def hunyuan(**changes: Any) -> PreTrainedConfig:
    """A model whose config may list a top-k for each of its four layers."""
    return tiny_config(CONFIG_MAPPING["hunyuan_v1_moe"], **changes)


def refusal(config: PreTrainedConfig, kind: type[MoePruneError]) -> str:
    with pytest.raises(kind) as error:
        derive_anatomy(config)
    return str(error.value)


def test_a_list_with_the_same_top_k_for_every_layer_is_a_number():
    assert derive_anatomy(hunyuan(moe_topk=[3, 3, 3, 3])).top_k.value == 3


def test_layers_that_use_different_numbers_of_experts():
    assert refusal(hunyuan(moe_topk=[3, 3, 2, 3]), UnsupportedModelError) == (
        "hunyuan_v1_moe: its config gives no one number of active experts for all layers (moe_topk lists [2, 3]). "
        "Only models that use as many experts in every layer are supported."
    )


@pytest.mark.parametrize("short", [[], [3, 3, 3]])
def test_a_list_with_fewer_entries_than_layers(short):
    """transformers fails in the middle of building the model."""
    assert refusal(hunyuan(moe_topk=short), UnsupportedModelError) == (
        "hunyuan_v1_moe: transformers cannot build the model that its config describes (IndexError: list index out of "
        "range). Compare config.json with the original."
    )


def test_more_active_experts_than_experts():
    """It builds, and fails on the first token."""
    assert refusal(hunyuan(moe_topk=13), CheckpointError) == (
        "hunyuan_v1_moe: its config says moe_topk = 13 and num_experts = 12; a token cannot use more experts than a "
        "layer has. Correct config.json, or download it again."
    )


@pytest.mark.parametrize("count", [0, 1])
def test_a_dense_model_of_a_type_that_may_have_experts(count):
    assert refusal(hunyuan(num_experts=count), UnsupportedModelError) == (
        f"hunyuan_v1_moe: not a Mixture-of-Experts model (its config: num_experts is {count})."
    )


@pytest.mark.parametrize(
    ("n_group", "topk_group", "of", "least"),
    [(5, 2, "5 groups, of which a token uses 2", 2), (3, 4, "3 groups, of which a token uses 4", 2),
     (12, 6, "12 groups, of which a token uses 6", 2), (6, 1, "6 groups, of which a token uses 1", 2)],
)  # fmt: skip
def test_groups_that_cannot_be(n_group, topk_group, of, least):
    """transformers builds such a model and mixes up its groups, or fails on some numbers of tokens."""
    config = tiny_config(CONFIG_MAPPING["deepseek_v3"], n_group=n_group, topk_group=topk_group)
    assert refusal(config, CheckpointError) == (
        f"deepseek_v3: its config has 12 experts in {of} for 3 experts. Groups must be equal, of at least {least}, and "
        "hold the experts of a token. Compare config.json with the original."
    )


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (3, 3), (6, 2), (2, 1)])
def test_groups_that_can_be(n_group, topk_group):
    config = tiny_config(CONFIG_MAPPING["deepseek_v3"], n_group=n_group, topk_group=topk_group)
    assert derive_anatomy(config).routing.n_group == n_group


def test_a_router_that_would_not_fit_into_memory_is_described_without_running_it():
    anatomy = derive_anatomy(hunyuan(num_experts=10**11))
    assert (anatomy.num_experts.value, anatomy.routing.scoring) == (10**11, "unknown")


def test_a_decoder_layer_beyond_the_last_is_no_prediction_layer(tmp_path):
    """It once was taken for one, and pruned with the experts of the layer before it."""
    folder = save("mixtral", tmp_path)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    assert str(error.value) == (
        "the checkpoint has a layer 1, the config says num_hidden_layers = 1. Is config.json that of another model?"
    )


def test_a_decoder_layer_too_many_before_a_prediction_layer(tmp_path):
    folder = save("glm4_moe", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}))
    assert "model.layers.3.eh_proj.weight" in open_source(folder).mtp
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="the checkpoint has a layer 2, the config says num_hidden_layers = 2"):
        open_source(folder)


def test_prediction_layers_are_known_by_their_number_or_by_their_tensors(tmp_path):
    """A checkpoint may keep one although its config says that there are none."""
    folder = Path(save("mixtral", tmp_path))
    extra = "model.layers.2.self_attn.q_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({extra: torch.zeros(32, 32)}))
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, num_nextn_predict_layers=1)
    assert extra in open_source(folder).mtp
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.2.enorm.weight": torch.zeros(32)}))
    assert extra in open_source(folder).mtp
