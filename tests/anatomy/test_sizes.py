"""Parameters and bytes, against real models, the formula of a gated expert, and what the makers of models publish."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.inspect import inspect_model
from moeprune.anatomy.names import NUM_EXPERTS, TOP_K
from moeprune.anatomy.sizes import PARTS, measure_sizes, pruned_sizes
from moeprune.anatomy.skeleton import load_config
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import UnsupportedModelError
from tests.anatomy.published import config_of
from tests.models import FAMILIES, VOCAB, build, save
from tests.pruning import COUNTS, edit_config, edit_tensors

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


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """A folder with the config of a published model, and nothing else."""
    (folder / "config.json").write_text(json.dumps(config_of(name) | changes))
    return folder


def test_what_a_deployer_reads_of_deepseek_v3(tmp_path):
    found = inspect_model(write_config(tmp_path, "DeepSeek-V3"))
    assert found["dense_layers"] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert found["moe_layers"] == [f"model.layers.{i}" for i in range(3, 61)]
    assert (found["num_layers"], found["num_experts"], found["top_k"], found["shared_experts"]) == (61, 256, 8, 1)
    assert found["router"] == "sigmoid, renormalised, correction bias, 4 of 8 groups, weights x 2.5"
    assert found["context"] == 163840
    assert found["weights_read_from"] == "config only"
    assert found["architecture"] == "DeepseekV3ForCausalLM"
    assert found["quantisation"] == {"method": "fp8", "title": "FP8 block 128x128", "bits": 8}
    assert found["multi_token_prediction"] == {"layers": 1, "parameters": 0, "bytes": 0}
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


def test_bytes_of_a_quantised_model_follow_from_its_config(tmp_path):
    quantised = inspect_model(write_config(tmp_path, "DeepSeek-V3"))["bytes"]
    plain = inspect_model(write_config(tmp_path, "DeepSeek-V3", quantization_config=None))["bytes"]
    assert (quantised["an_expert"], plain["an_expert"]) == (3 * 7168 * 2048, 2 * 3 * 7168 * 2048)
    for part, number in quantised["by_part"].items():
        unchanged = part in ("router", "embeddings", "output head", "other modalities")
        assert number == (plain["by_part"][part] if unchanged else plain["by_part"][part] // 2), part


def test_what_a_config_says_is_not_quantised_is_counted_in_full(tmp_path):
    found = inspect_model(write_config(tmp_path, "gpt-oss-20b"))
    parameters, num_bytes = found["parameters"]["by_part"], found["bytes"]["by_part"]
    assert found["quantisation"] == {"method": "mxfp4", "title": "MXFP4", "bits": 4}
    assert num_bytes["routed experts"] == parameters["routed experts"] // 2
    assert num_bytes["attention"] == 2 * parameters["attention"]


def test_a_vision_tower_is_no_part_of_a_text_tokens_work(tmp_path):
    config: Any = load_config(write_config(tmp_path, "Llama-4-Scout-17B-16E"))
    with torch.device("meta"):
        vision = transformers.Llama4VisionModel(config.vision_config)
        projector = Llama4MultiModalProjector(config)
    expected = sum(p.numel() for module in (vision, projector) for p in module.parameters())
    sizes = measure_sizes(derive_anatomy(config))
    assert sizes.parameters["other modalities"] == expected
    config.vision_config.num_hidden_layers = 1
    smaller = measure_sizes(derive_anatomy(config))
    assert smaller.total() < sizes.total()
    assert smaller.active() == sizes.active()


# Inspecting folders with weights


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
    assert found["quantisation"] is None
    assert found["bytes"]["by_dtype"] == {"BF16": found["bytes"]["total"]}
    model = build(family)
    dense = [f"model.layers.{i}" for i, layer in enumerate(model.model.layers) if not hasattr(layer.mlp, "experts")]
    assert found["dense_layers"] == dense


def add_mtp_layer(tensors: dict[str, Tensor]) -> None:
    """Store the last layer of a tiny DeepSeek-V3 once more as its multi-token prediction layer, with what that adds."""
    for key in [key for key in tensors if key.startswith("model.layers.2.")]:
        tensors[key.replace("layers.2", "layers.3")] = tensors[key].clone()
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    tensors["model.layers.3.enorm.weight"] = torch.ones(HIDDEN)


def test_multi_token_prediction_layers_are_counted_apart(tmp_path):
    folder = save("deepseek_v3", tmp_path)
    edit_config(folder, num_nextn_predict_layers=1)
    without = inspect_model(folder)
    assert without["multi_token_prediction"] == {"layers": 1, "parameters": 0, "bytes": 0}
    edit_tensors(folder, add_mtp_layer)
    found = inspect_model(folder)
    stored = load_file(folder / "model.safetensors")
    mtp = sum(tensor.numel() for key, tensor in stored.items() if re.match(r"model\.layers\.3\.", key))
    assert found["multi_token_prediction"] == {"layers": 1, "parameters": mtp, "bytes": 4 * mtp}
    assert found["parameters"] == without["parameters"]
    assert found["bytes"]["total"] == without["bytes"]["total"] + 4 * mtp
    experts = 3 * (EXPERTS["deepseek_v3"][0] // 2) * (an_expert("deepseek_v3") + router_row("deepseek_v3"))
    assert found["bytes"]["total"] - found["pruned"][1]["bytes"] == 4 * experts, "pruned with the trunk"


def test_prediction_layers_that_the_config_does_not_mention(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    before = inspect_model(folder)
    assert before["multi_token_prediction"] is None
    copied = "model.layers.2."  # as Qwen3-Next stores them: `mtp.layers.0.`

    def add(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(copied)]:
            tensors[key.replace(copied, "mtp.layers.0.")] = tensors[key].clone()

    edit_tensors(folder, add)
    mtp = sum(t.numel() for key, t in load_file(folder / "model.safetensors").items() if key.startswith("mtp."))
    found = inspect_model(folder)
    assert found["multi_token_prediction"] == {"layers": None, "parameters": mtp, "bytes": 4 * mtp}
    assert found["parameters"] == before["parameters"]


def test_bytes_are_those_of_each_stored_dtype(tmp_path):
    folder = save("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))
    dtypes = inspect_model(folder)["bytes"]["by_dtype"]
    assert list(dtypes) == ["BF16", "F32"], "most first"
    assert dtypes["F32"] == 4 * VOCAB * HIDDEN
    assert dtypes["BF16"] == open_checkpoint(folder).num_bytes - dtypes["F32"]


def test_a_checkpoint_whose_weights_are_of_another_model(tmp_path):
    folder = save("mixtral", tmp_path / "a")
    save("gpt_oss", tmp_path / "b")
    (folder / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(UnsupportedModelError) as error:
        inspect_model(folder)
    assert str(error.value) == f"{folder}: none of the stored tensors is a routed expert of gpt_oss."


def test_the_known_names_of_counts_do_not_overlap():
    assert not set(NUM_EXPERTS) & set(TOP_K)
