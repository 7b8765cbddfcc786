"""Pruning quantised checkpoints: every companion travels with its expert, and nothing is dequantised on the way."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.anatomy.formats import FORMATS
from moeprune.anatomy.quantization import quantisation_of
from moeprune.anatomy.source import open_source
from moeprune.apply.memory import apply_plan
from moeprune.checkpoint.load import align_memory
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.plan.plan import Plan
from tests import quantisers as q
from tests.formats import SCHEMES, save_mxfp4, save_quantised
from tests.models import save
from tests.pruning import edit_config, edit_tensors, logits, plan_for

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
EXPERT = re.compile(r"^(?P<layer>model\.layers\.\d+)\.(?P<block>\w+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
ROUTER = re.compile(r"^(?P<layer>model\.layers\.\d+)\.\w+\.(gate\.weight|gate\.e_score_correction_bias|router\.\w+)$")
FUSED = re.compile(r"^(?P<layer>model\.layers\.\d+)\.\w+\.experts\.[a-z_]+$")


def selected(
    tensors: dict[str, Tensor], keep: Mapping[str, Sequence[int]], *, shared: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """What is to be left of a checkpoint, found by names alone.

    Args:
        tensors: The source's tensors.
        keep: Kept expert ids by layer.
        shared: Endings of fused tensors that have no expert axis.
    """
    left = {}
    for key, tensor in tensors.items():
        single, many = EXPERT.match(key), ROUTER.match(key) or FUSED.match(key)
        if single and single["layer"] in keep:
            if int(single["expert"]) in keep[single["layer"]]:
                new = keep[single["layer"]].index(int(single["expert"]))
                left[f"{single['layer']}.{single['block']}.experts.{new}.{single['rest']}"] = tensor
        elif many and many["layer"] in keep and not key.endswith(shared or ("\0",)):
            left[key] = torch.stack([tensor[expert] for expert in keep[many["layer"]]])
        else:
            left[key] = tensor
    return left


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (tensor.dtype, tensor.shape), key
        same = (
            actual[key].contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
        )
        assert same, key


def dequantised(tensors: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Every expert's weight by the slow reading of the format, by module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = EXPERT.match(key)
        if match:
            projection, _, part = match["rest"].partition(".")
            module = f"{match['layer']}.{match['block']}.experts.{match['expert']}.{projection}"
            parts.setdefault(module, {})[part] = tensor
    return {module: SCHEMES[scheme].decode(held) for module, held in parts.items()}


def export(source: Path, out: Path, plan: Plan) -> dict[str, Tensor]:
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_of_a_kept_expert_is_copied_and_none_of_a_dropped_one(tmp_path, family, scheme):
    save_quantised(family, tmp_path / "source", scheme)
    plan = plan_for(tmp_path / "source", family)
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert_same_bytes(export(tmp_path / "source", tmp_path / "pruned", plan), selected(source, plan.keep))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_experts_dequantise_to_what_they_were_before(tmp_path, scheme):
    originals = save_quantised("mixtral", tmp_path / "source", scheme)
    plan = plan_for(tmp_path / "source", "mixtral")
    found = dequantised(export(tmp_path / "source", tmp_path / "pruned", plan), scheme)
    assert len(found) == 2 * plan.num_experts * 3
    for module, weight in found.items():
        match = EXPERT.match(f"{module}.weight")
        expert = plan.keep[match["layer"]][int(match["expert"])]
        original = originals[f"{match['layer']}.{match['block']}.experts.{expert}.{match['rest']}"].float()
        others = [tensor.float() for key, tensor in originals.items() if tensor.shape == original.shape]
        assert (weight - original).abs().max() <= SCHEMES[scheme].error * original.abs().max(), module
        assert sum(bool((weight - other).abs().max() <= original.abs().max() / 2) for other in others) == 1, module


def load(folder: Path) -> transformers.PreTrainedModel:
    """The model as transformers loads it on a CPU, dequantised; only scales of activations may be left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, device_map="cpu")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(re.search(r"\.input(_global)?_scale$", key) for key in info["unexpected_keys"]), info["unexpected_keys"]
    align_memory(model)
    return model.eval()


def assert_equals_pruning_in_memory(source: Path, out: Path, plan: Plan) -> None:
    original = load(source)
    in_memory = apply_plan(original, plan=plan, anatomy=open_source(source).anatomy)
    export(source, out, plan)
    exported = load(out)
    expected = in_memory.state_dict()
    for name, tensor in exported.state_dict().items():
        assert tensor.equal(expected[name]), name
    align_memory(in_memory)
    assert logits(exported).equal(logits(in_memory))
    assert not logits(exported).equal(logits(original))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-static"])
def test_a_pruned_fp8_checkpoint_computes_what_the_pruned_dequantised_model_does(tmp_path, family, scheme):
    save_quantised(family, tmp_path / "source", scheme)
    plan = plan_for(tmp_path / "source", family)
    assert_equals_pruning_in_memory(tmp_path / "source", tmp_path / "pruned", plan)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["ct-fp8-channel", "ct-fp8-tensor", "ct-int4", "ct-nvfp4"])
def test_a_pruned_compressed_tensors_checkpoint_computes_what_the_pruned_dequantised_model_does(
    tmp_path, family, scheme
):
    pytest.importorskip("compressed_tensors")
    save_quantised(family, tmp_path / "source", scheme)
    plan = plan_for(tmp_path / "source", family)
    assert_equals_pruning_in_memory(tmp_path / "source", tmp_path / "pruned", plan)


def test_a_pruned_mxfp4_checkpoint_computes_what_the_pruned_dequantised_model_does(tmp_path):
    save_mxfp4(tmp_path / "source")
    plan = plan_for(tmp_path / "source", "gpt_oss")
    assert_equals_pruning_in_memory(tmp_path / "source", tmp_path / "pruned", plan)


def test_blocks_scales_and_biases_of_mxfp4_are_sliced_alike(tmp_path):
    save_mxfp4(tmp_path / "source")
    plan = plan_for(tmp_path / "source", "gpt_oss")
    source = load_file(tmp_path / "source" / "model.safetensors")
    pruned = export(tmp_path / "source", tmp_path / "pruned", plan)
    assert_same_bytes(pruned, selected(source, plan.keep))
    for layer, keep in plan.keep.items():
        name = f"{layer}.mlp.experts.gate_up_proj"
        before, after = (
            q.decode_mxfp4({part: tensors[f"{name}_{part}"] for part in ("blocks", "scales")})
            for tensors in (source, pruned)
        )
        assert after.equal(before[list(keep)])


def fused_block(weight: Tensor) -> dict[str, Tensor]:
    """FP8 with a scale for each square of weights, as transformers names it."""
    scale = q.block_maxima(weight) / q.F8_MAX
    return {"": (weight / q.spread(scale, weight.shape)).to(q.F8), "_scale_inv": scale}


def fused_static(weight: Tensor) -> dict[str, Tensor]:
    """FP8 with one scale for all experts, and one for their inputs."""
    scale = weight.abs().max() / q.F8_MAX
    parts = {"": (weight / scale).to(q.F8), "_scale_inv": scale.reshape(1), "_activation_scale": torch.tensor(0.5)}
    return parts


def fused_channel(weight: Tensor) -> dict[str, Tensor]:
    """FBGEMM's FP8: a scale for each row."""
    scale = weight.abs().amax(-1, keepdim=True) / q.F8_MAX
    return {"": (weight / scale).to(q.F8), "_scale": scale}


def fused_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's NVFP4: scales of groups by expert, those of the whole tensor and of its inputs shared by all."""
    parts = [q.encode_modelopt(expert) for expert in weight]
    return {
        "": torch.stack([part["weight"] for part in parts]),
        "_weight_scale": torch.stack([part["weight_scale"] for part in parts]),
        "_weight_scale_2": parts[0]["weight_scale_2"],
        "_input_scale": parts[0]["input_scale"],
    }


FUSED_FORMATS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [8, 8]}, fused_block, ()),
    "fp8-static": ({"quant_method": "fp8"}, fused_static, ("_scale_inv", "_activation_scale")),
    "fbgemm-fp8": ({"quant_method": "fbgemm_fp8"}, fused_channel, ()),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, fused_nvfp4, ("_weight_scale_2", "_input_scale")
    ),
}  # fmt: skip


def save_fused(folder: Path, config: dict[str, object], encode: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """Save a qwen3_moe checkpoint with the experts of each layer in one quantised tensor a projection."""
    save("qwen3_moe", folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in sorted({match["layer"] for key in tensors if (match := EXPERT.match(key))}):
        stacked = {
            projection: torch.stack([tensors.pop(f"{layer}.mlp.experts.{e}.{projection}.weight") for e in range(10)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up = torch.cat([stacked["gate_proj"], stacked["up_proj"]], 1)
        for name, weight in {"gate_up_proj": gate_up, "down_proj": stacked["down_proj"]}.items():
            for ending, tensor in encode(weight).items():
                tensors[f"{layer}.mlp.experts.{name}{ending}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)


@pytest.mark.parametrize("form", FUSED_FORMATS)
def test_a_fused_scale_is_sliced_unless_all_experts_share_it(tmp_path, form):
    config, encode, shared = FUSED_FORMATS[form]
    save_fused(tmp_path / "source", config, encode)
    plan = plan_for(tmp_path / "source", "qwen3_moe")
    source = load_file(tmp_path / "source" / "model.safetensors")
    expected = selected(source, plan.keep, shared=shared)
    assert_same_bytes(export(tmp_path / "source", tmp_path / "pruned", plan), expected)


def add_prediction_layer(tensors: dict[str, Tensor]) -> None:
    """A layer 3 beyond the last, like layer 2 but with the rows of its tensors in reverse."""
    for key in [key for key in tensors if key.startswith("model.layers.2.")]:
        tensor = tensors[key]
        reverse = torch.stack(list(reversed(tensor.unbind()))) if tensor.ndim else tensor.clone()
        tensors[key.replace(".2.", ".3.", 1)] = reverse


@pytest.mark.parametrize("mtp", ["prune", "drop"])
def test_quantised_experts_of_prediction_layers_follow_the_last_layer_with_their_scales_and_their_names(tmp_path, mtp):
    source = tmp_path / "source"
    save_quantised("deepseek_v3", source, "fp8-block")
    edit_tensors(source, add_prediction_layer)
    names = [f"model.layers.3.mlp.experts.{expert}.up_proj" for expert in range(16)]
    edit_config(source, num_nextn_predict_layers=1)
    entry = SCHEMES["fp8-block"].config(["lm_head", *names])
    edit_config(source, quantization_config=entry)
    plan = plan_for(source, "deepseek_v3").model_copy(update={"mtp": mtp})
    tensors = load_file(source / "model.safetensors")
    keep = plan.keep | {"model.layers.3": plan.keep["model.layers.2"]}
    expected = selected(tensors, keep)
    if mtp == "drop":
        expected = {key: tensor for key, tensor in expected.items() if "model.layers.3." not in key}
    assert_same_bytes(export(source, tmp_path / "pruned", plan), expected)
    written = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    assert written["modules_to_not_convert"] == ["lm_head", *(names[: plan.num_experts] if mtp == "prune" else [])]


def test_unquantised_experts_keep_their_entry_in_the_config_under_their_new_numbers(tmp_path):
    source = tmp_path / "source"
    save_quantised("mixtral", source, "gptq")
    plan = plan_for(source, "mixtral")
    (first, keep), (second, others) = plan.keep.items()
    dropped = next(expert for expert in range(6) if expert not in keep)
    block = "block_sparse_moe.experts"
    alone = (f"{first}.{block}.{keep[-1]}.w2", f"{first}.{block}.{dropped}.w2", f"{second}.{block}.{others[0]}.w1")
    save_quantised("mixtral", source, "awq", unquantised=alone)
    plan = plan_for(source, "mixtral")
    tensors = export(source, tmp_path / "pruned", plan)
    entries = json.loads((tmp_path / "pruned" / "config.json").read_text())["quantization_config"]
    named = [name for name in entries["modules_to_not_convert"] if ".experts." in name]
    assert named == [f"{first}.{block}.{len(keep) - 1}.w2", f"{second}.{block}.0.w1"]
    unquantised = sorted(key for key in tensors if EXPERT.match(key) and key.endswith(".weight"))
    assert unquantised == [f"{name}.weight" for name in named]


def test_modelopts_own_file_names_the_experts_that_are_left(tmp_path):
    source = tmp_path / "source"
    save_quantised("qwen3_moe", source, "modelopt-nvfp4")
    plan = plan_for(source, "qwen3_moe")
    layer, keep = next(iter(plan.keep.items()))
    names = [f"{layer}.mlp.experts.{expert}.up_proj" for expert in range(10)]
    quantization = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", *names], "group_size": 16}
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    export(source, tmp_path / "pruned", plan_for(source, "qwen3_moe"))
    written = json.loads((tmp_path / "pruned" / "hf_quant_config.json").read_text())["quantization"]
    assert written == quantization | {"exclude_modules": ["lm_head", *names[: len(keep)]]}


def test_a_pattern_that_singles_out_experts_is_refused_before_anything_is_written(tmp_path):
    save_quantised("mixtral", tmp_path / "source", "ct-int4")
    entry = SCHEMES["ct-int4"].config([r"re:.*experts\.3\..*"])
    edit_config(tmp_path / "source", quantization_config=entry)
    with pytest.raises(UnsupportedModelError, match="singles out experts"):
        export(tmp_path / "source", tmp_path / "pruned", plan_for(tmp_path / "source", "mixtral"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("scheme", "companion"),
    [("fp8-block", "weight_scale_inv"), ("ct-int4", "weight_shape"), ("gptq", "g_idx"), ("bnb-nf4", "weight.absmax")],
)
def test_an_expert_without_its_companion_is_refused(tmp_path, scheme, companion):
    save_quantised("mixtral", tmp_path, scheme)
    key = f"model.layers.1.block_sparse_moe.experts.3.w2.{companion}"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"expert 3 of .*w2.* lacks {companion.removeprefix('weight.')}"):
        open_source(tmp_path)


def test_a_quantised_checkpoint_whose_config_lost_its_entry_is_told_so(tmp_path):
    save_quantised("qwen3_moe", tmp_path, "gptq")
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(gptq\), config.json must have the quantization_"):
        open_source(tmp_path)


def test_a_fused_scale_without_expert_axis_is_refused(tmp_path):
    save_mxfp4(tmp_path)
    key = "model.layers.1.mlp.experts.down_proj_scales"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key][:7]}))
    with pytest.raises(UnsupportedModelError, match="expected 10 experts on the first axis"):
        open_source(tmp_path)


def test_bitsandbytes_reads_the_weights_of_the_pruned_checkpoint_as_the_tests_do(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    save_quantised("mixtral", tmp_path / "source", "bnb-nf4")
    plan = plan_for(tmp_path / "source", "mixtral")
    pruned = export(tmp_path / "source", tmp_path / "pruned", plan)
    weights = dequantised(pruned, "bnb-nf4")
    for module, expected in weights.items():
        stem = f"{module}.weight."
        parts = {key.removeprefix(stem): tensor for key, tensor in pruned.items() if key.startswith(stem)}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        # Its CPU kernel (0.50.2) takes a wrong scale where a block of 64 values crosses the end of a row.
        state.shape = torch.Size([expected.numel() // 64, 64])
        found = functional.dequantize_4bit(pruned[f"{module}.weight"], state)
        assert found.reshape(expected.shape).equal(expected), module


def test_every_format_in_the_table_has_a_checkpoint_here():
    entries = [scheme.config([]) for scheme in SCHEMES.values()]
    entries += [{"quant_method": "mxfp4"}, *(config for config, _, _ in FUSED_FORMATS.values())]
    stored = {quantisation_of({"quantization_config": entry}).stored.name for entry in entries}
    assert stored == FORMATS.keys()
