"""Stored tensors and the experts they hold, in every layout and under the names of every era."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.skeleton import load_config
from moeprune.anatomy.source import open_source
from moeprune.anatomy.stored import AllExperts, OneExpert, Role, map_stored, model_names
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import CheckpointError, MoePruneError, UnsupportedModelError
from tests.models import FAMILIES, build, save
from tests.pruning import edit_config, edit_tensors

PER_EXPERT = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3"), "block_sparse_moe.gate"),
    "deepseek_v2": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
    "glm4_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"),
}
LAYERS = {"qwen3_moe": (0, 2), "deepseek_v2": (1, 2), "deepseek_v3": (1, 2), "glm4_moe": (1, 2)}
NUM_EXPERTS = {"mixtral": 6, "deepseek_v2": 12, "deepseek_v3": 16}


def roles_of(folder: Path) -> dict[str, Role]:
    anatomy = derive_anatomy(load_config(folder))
    return map_stored(anatomy, open_checkpoint(folder).tensors).roles


def refusal(folder: Path, kind: type[MoePruneError]) -> str:
    with pytest.raises(kind) as error:
        roles_of(folder)
    return str(error.value)


@pytest.mark.parametrize("family", PER_EXPERT)
def test_checkpoints_of_single_experts(tmp_path, family):
    block, projections, gate = PER_EXPERT[family]
    layers, num_experts = LAYERS.get(family, (0, 1)), NUM_EXPERTS.get(family, 10)
    expected: dict[str, Role] = {}
    for i in layers:
        layer = f"model.layers.{i}"
        for expert in range(num_experts):
            prefix = f"{layer}.{block}.experts."
            for projection in projections:
                start, stop = len(prefix), len(prefix) + len(str(expert))
                expected[f"{prefix}{expert}.{projection}.weight"] = OneExpert(layer, expert, start, stop)
        expected[f"{layer}.{gate}.weight"] = AllExperts(layer, 0)
        if family in ("deepseek_v3", "glm4_moe"):
            expected[f"{layer}.{gate}.e_score_correction_bias"] = AllExperts(layer, 0)
    assert roles_of(save(family, tmp_path)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_checkpoints(tmp_path, family):
    build(family).save_pretrained(tmp_path, save_original_format=False)
    anatomy = derive_anatomy(load_config(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(f".experts.{i}." in key for key in stored for i in range(16)), "the layout under test"
    assert roles_of(tmp_path) == {name: AllExperts(axis.layer, axis.dim) for name, axis in anatomy.axes.items()}


def test_mixtral_under_its_old_names_maps_to_the_tensors_of_the_model(tmp_path):
    folder = save("mixtral", tmp_path)
    names = model_names(derive_anatomy(load_config(folder)), open_checkpoint(folder).tensors)
    assert names["model.layers.1.block_sparse_moe.experts.4.w1.weight"] == "model.layers.1.mlp.experts.gate_up_proj"
    assert names["model.layers.1.block_sparse_moe.experts.4.w3.weight"] == "model.layers.1.mlp.experts.gate_up_proj"
    assert names["model.layers.1.block_sparse_moe.experts.4.w2.weight"] == "model.layers.1.mlp.experts.down_proj"
    assert names["model.layers.1.block_sparse_moe.gate.weight"] == "model.layers.1.mlp.gate.weight"
    assert names["lm_head.weight"] == "lm_head.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_model_is_found_in_its_checkpoint(tmp_path, family):
    folder = save(family, tmp_path)
    anatomy = derive_anatomy(load_config(folder))
    assert set(model_names(anatomy, open_checkpoint(folder).tensors).values()) == set(anatomy.skeleton.state_dict())


def test_an_expert_is_renumbered_in_its_own_place_only():
    key = "model.layers.12.mlp.experts.1.down_proj.weight"
    role = OneExpert("model.layers.12", 1, key.index("1.down"), key.index("1.down") + 1)
    assert role.renumbered(key, 107) == "model.layers.12.mlp.experts.107.down_proj.weight"


def test_shared_experts_are_not_routed_experts(tmp_path):
    roles = roles_of(save("deepseek_v3", tmp_path))
    assert not any("shared" in key for key in roles)


@pytest.mark.parametrize(
    ("family", "prefix", "suffix", "count", "number"),
    [
        ("qwen3_moe", "model.layers.2.mlp.experts.", ".up_proj.weight", 10, 7),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.", ".w2.weight", 6, 0),
    ],
)
def test_a_missing_expert_is_named_by_pattern_and_number(tmp_path, family, prefix, suffix, count, number):
    folder = save(family, tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{prefix}{number}{suffix}"))
    assert refusal(folder, CheckpointError) == (
        f"{folder}: 1 of {count} experts are missing from '{prefix}*{suffix}', first expert {number}. "
        "Download the checkpoint again."
    )


def test_a_missing_projection_of_all_experts_is_not_overlooked(tmp_path):
    """gate_proj and up_proj become one tensor of the model, so that tensor's name alone does not show the loss."""
    folder = save("qwen3_moe", tmp_path)

    def drop(tensors):
        for key in [key for key in tensors if "layers.2." in key and ".experts." in key and "up_proj" in key]:
            del tensors[key]

    edit_tensors(folder, drop)
    assert refusal(folder, CheckpointError) == (
        f"{folder}: the stored tensors that become 'model.layers.2.mlp.experts.gate_up_proj' have {10 * 24 * 32} "
        "elements, "
        f"the model has {10 * 48 * 32}. Download the checkpoint again."
    )


def test_a_layer_stored_both_fused_and_by_expert_is_refused(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    key = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(10, 32, 24)}))
    assert f"the stored tensors that become {key!r} have {2 * 10 * 32 * 24} elements" in refusal(
        folder, CheckpointError
    )


def test_an_expert_too_many_is_not_dropped_in_silence(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    key = "model.layers.0.mlp.experts.{}.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key.format(10): torch.zeros(32, 24)}))
    assert refusal(folder, CheckpointError) == (
        f"{folder}: {key.format('*')!r} has an expert 10, but the config says 10 experts."
    )


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path, key):
    folder = save("qwen3_moe", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    assert refusal(folder, CheckpointError) == (
        f"{folder}: no stored tensor for {key!r} of the model. Download the checkpoint again."
    )


def test_tied_embeddings_need_one_stored_copy(tmp_path):
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert len(roles_of(tmp_path)) == 2 * (3 * 10 + 1)


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv",
            "If it is quantised (fp8), config.json must have the quantization_config.",
        ),
        ("model.vision.layers.1.experts.w1", "Pruning such checkpoints is not supported."),
    ],
)
def test_experts_that_transformers_does_not_load_are_refused(tmp_path, key, way_out):
    """Copied as they are they would have more experts than the pruned config says."""
    folder = save("deepseek_v3", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(24, 32)}))
    assert refusal(folder, UnsupportedModelError) == (
        f"{folder}: {key!r} belongs to experts that transformers does not load. {way_out}"
    )


def test_an_unknown_tensor_that_is_no_expert_has_no_role(tmp_path):
    folder = save("deepseek_v3", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.3.shared_head.norm.weight": torch.zeros(32)}))
    assert "model.layers.3.shared_head.norm.weight" not in roles_of(folder)


def test_a_router_of_another_size_is_refused(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    key = "model.layers.0.mlp.gate.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(11, 32)}))
    assert refusal(folder, UnsupportedModelError) == (
        f"{folder / 'model.safetensors'}: {key!r} is stored as [11, 32], the model has [10, 32] with the experts on "
        "axis 0. Either config.json is of another model, or the layout is not supported."
    )


def test_fused_experts_stored_the_other_way_round_are_refused(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    key = "model.layers.0.mlp.experts.down_proj"

    def move(tensors):
        tensors[key] = tensors[key].movedim(0, 2)

    edit_tensors(tmp_path, move)
    assert "is stored as [32, 24, 10], the model has [10, 32, 24]" in refusal(tmp_path, UnsupportedModelError)


def test_more_stored_experts_than_the_config_says(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    edit_config(folder, num_local_experts=9, num_experts=9)
    with pytest.raises(MoePruneError):
        roles_of(folder)


def test_a_checkpoint_without_any_tensor(tmp_path):
    folder = save("mixtral", tmp_path)
    edit_tensors(folder, lambda tensors: tensors.clear())
    assert refusal(folder, CheckpointError) == f"{folder}: its safetensors files hold no tensors. Download it again."


# The source of a pipeline


def test_the_source_carries_name_fingerprint_and_roles(tmp_path):
    folder = save("mixtral", tmp_path)
    source = open_source(folder)
    assert source.path == folder
    assert source.roles == roles_of(folder)
    assert source.facts.name == str(folder)
    assert source.facts.fingerprint == open_checkpoint(folder).fingerprint()


@pytest.mark.parametrize("value", [{"bits": 4}, {"quant_method": "homemade"}, "mxfp4"])
def test_a_source_in_an_unknown_quantised_format_is_refused(tmp_path, value):
    folder = save("mixtral", tmp_path)
    edit_config(folder, quantization_config=value)
    with pytest.raises(MoePruneError, match=r"quantiz|quantis"):
        open_source(folder)
