"""Parameters and bytes, against real models, the formula of a gated expert, and what the makers of models publish."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.inspect import inspect_model
from moeprune.anatomy.names import NUM_EXPERTS, TOP_K
from moeprune.anatomy.sizes import PARTS, measure_sizes, pruned_sizes
from moeprune.anatomy.skeleton import load_config
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import UnsupportedModelError
from tests.anatomy.configs import PUBLISHED
from tests.models import FAMILIES, VOCAB, build, save
from tests.pruning import COUNTS, edit_config

HIDDEN, INTERMEDIATE = 32, 24
# (experts, top-k, layers with experts) of the tiny families
EXPERTS = {
    "qwen3_moe": (10, 3, 2), "qwen2_moe": (10, 3, 2), "mixtral": (6, 2, 2), "olmoe": (10, 3, 2),
    "deepseek_v2": (12, 3, 2),
    "deepseek_v3": (16, 3, 2), "glm4_moe": (10, 3, 2), "gpt_oss": (10, 3, 2),
}  # fmt: skip


def an_expert(family: str) -> int:
    """Parameters of one expert: gate, up and down projections, and their biases where there are any."""
    biases = 2 * INTERMEDIATE + HIDDEN if family == "gpt_oss" else 0
    return 3 * HIDDEN * INTERMEDIATE + biases


def router_row(family: str) -> int:
    """Parameters of one expert's row of the router, its bias included."""
    return HIDDEN + (family in ("gpt_oss", "deepseek_v3", "glm4_moe"))


def all_numbers(model: torch.nn.Module) -> int:
    """Every stored number once."""
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    return sum(distinct.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_total_and_active_parameters(family):
    experts, top_k, layers = EXPERTS[family]
    sizes = measure_sizes(derive_anatomy(FAMILIES[family]()))
    total = all_numbers(build(family))
    assert sizes.total() == total == sum(sizes.parameters.values())
    assert sizes.parameters["routed experts"] == layers * experts * an_expert(family)
    assert sizes.parameters["router"] == layers * experts * router_row(family)
    assert sizes.active() == total - layers * (experts - top_k) * an_expert(family)
    assert tuple(sizes.parameters) == PARTS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_pruning_leaves(family):
    experts, _, layers = EXPERTS[family]
    kept, active = COUNTS[family]
    pruned = pruned_sizes(measure_sizes(derive_anatomy(FAMILIES[family]())), num_experts=kept, top_k=active)
    total = all_numbers(build(family))
    gone = layers * (experts - kept) * (an_expert(family) + router_row(family))
    assert (pruned.parameters_before, pruned.parameters_after) == (total, total - gone)
    assert pruned.active_after == total - gone - layers * (kept - active) * an_expert(family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_stored_tensors(tmp_path, dtype):
    folder = save("glm4_moe", tmp_path, dtype=dtype, shard="60KB")
    checkpoint = open_checkpoint(folder)
    sizes = measure_sizes(derive_anatomy(load_config(folder)), checkpoint.tensors)
    stored = [tensor for shard in folder.glob("*.safetensors") for tensor in load_file(shard).values()]
    assert sizes.stored() == sum(tensor.nbytes for tensor in stored)
    assert sizes.bytes_per_expert == an_expert("glm4_moe") * dtype.itemsize
    assert sizes.num_bytes["embeddings"] == sizes.num_bytes["output head"] == VOCAB * HIDDEN * dtype.itemsize


def test_bytes_follow_from_the_dtype_of_the_config_where_there_are_no_weights():
    config = FAMILIES["mixtral"]()
    config.dtype = torch.float32
    four = measure_sizes(derive_anatomy(config))
    config.dtype = torch.bfloat16
    two = measure_sizes(derive_anatomy(config))
    assert four.stored() == 4 * four.total()
    assert two.stored() == 2 * two.total()


def test_tied_embeddings_are_counted_once():
    config = FAMILIES["qwen3_moe"]()
    untied = measure_sizes(derive_anatomy(config))
    config.tie_word_embeddings = True
    tied = measure_sizes(derive_anatomy(config))
    assert tied.total() == untied.total() - VOCAB * HIDDEN
    assert tied.total() == all_numbers(AutoModelForCausalLM.from_config(config))
    assert (tied.parameters["embeddings"], tied.parameters["output head"]) == (VOCAB * HIDDEN, 0)


# Inspecting configs of published models


def write_config(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path, name):
    published = PUBLISHED[name]
    found = inspect_model(write_config(tmp_path, name))["parameters"]
    active = found["active"]
    if not published.active_counts_embeddings:
        active -= found["by_part"]["embeddings"]
    assert found["total"] / 1e9 == pytest.approx(published.total, rel=0.01)
    assert active / 1e9 == pytest.approx(published.active, rel=0.03)


def test_what_a_deployer_reads_of_deepseek_v3(tmp_path):
    started = time.perf_counter()
    found = inspect_model(write_config(tmp_path, "DeepSeek-V3"))
    assert time.perf_counter() - started < 5, "671 billion parameters must be described, not built"
    assert found["moe_layers"] == [f"model.layers.{i}" for i in range(3, 61)]
    assert (found["num_layers"], found["num_experts"], found["top_k"], found["shared_experts"]) == (61, 256, 8, 1)
    assert found["router"] == "sigmoid, renormalised, correction bias, 4 of 8 groups, weights x 2.5"
    assert found["weights_read_from"] == "config only"
    assert found["architecture"] == "DeepseekV3ForCausalLM"
    assert found["bytes"]["an_expert"] == 3 * 7168 * 2048 * 2
    assert [(p["prune"], p["num_experts"]) for p in found["pruned"]] == [(0.25, 192), (0.5, 128)]
    routed = 58 * 256 * (3 * 7168 * 2048 + 7168 + 1)
    total = found["parameters"]["total"]
    assert [p["parameters"] for p in found["pruned"]] == [total - routed // 4, total - routed // 2]
    json.dumps(found)


@pytest.mark.slow
def test_inspecting_deepseek_v3_in_a_fresh_process_takes_seconds(tmp_path):
    code = "import sys, pathlib; from moeprune.anatomy.inspect import inspect_model as i; i(pathlib.Path(sys.argv[1]))"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(write_config(tmp_path, "DeepSeek-V3"))], check=True)
    assert time.perf_counter() - started < 60


def test_a_quantised_model_is_called_so_from_its_config_alone(tmp_path):
    write_config(tmp_path, "DeepSeek-V3")
    assert inspect_model(tmp_path)["quantised"] is False
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert inspect_model(tmp_path)["quantised"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_weights_is_measured_by_its_headers(tmp_path, family):
    folder = save(family, tmp_path, dtype=torch.bfloat16)
    found = inspect_model(folder)
    experts, top_k, layers = EXPERTS[family]
    assert found["weights_read_from"] == "headers"
    assert (found["num_experts"], found["top_k"], len(found["moe_layers"])) == (experts, top_k, layers)
    assert found["bytes"]["total"] == open_checkpoint(folder).num_bytes
    assert found["bytes"]["an_expert"] == 2 * an_expert(family)
    assert found["shared_experts"] == int(family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"))
    assert not found["quantised"]


def test_a_checkpoint_whose_weights_are_of_another_model(tmp_path):
    folder = save("mixtral", tmp_path / "a")
    save("gpt_oss", tmp_path / "b")
    (folder / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(UnsupportedModelError) as error:
        inspect_model(folder)
    assert str(error.value) == f"{folder}: none of the stored tensors is a routed expert of gpt_oss."


def test_the_known_names_of_counts_do_not_overlap():
    assert not set(NUM_EXPERTS) & set(TOP_K)
