import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.anatomy.companions import ExpertPart, check_companions, expert_dim
from moeprune.anatomy.formats import FORMATS, Companion, format_of, format_rows
from moeprune.anatomy.quantization import quantisation_of, refuse_merge
from moeprune.errors import CheckpointError, UnsupportedModelError
from tests.formats import SCHEMES

UP = "model.layers.2.mlp.experts.3.up_proj"
FUSED = "model.layers.2.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_that_a_quantiser_stores_leads_back_to_its_weight(scheme):
    stored = quantisation_of({"quantization_config": SCHEMES[scheme].config([])}).stored
    for part in SCHEMES[scheme].encode(torch.randn(16, 32)):
        if part != "weight":
            companion = stored.companion(f"{UP}.{part}")
            assert companion is not None and companion.base == f"{UP}.weight", part


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("fp8", f"{UP}.weight_scale_inv", (f"{UP}.weight", "weight_scale_inv", False)),
        ("fp8", "layers.2.ffn.experts.3.w1.scale", ("layers.2.ffn.experts.3.w1.weight", "scale", False)),
        ("fp8", f"{FUSED}_scale_inv", (FUSED, "weight_scale_inv", False)),
        ("fp8", f"{FUSED}_activation_scale", (FUSED, "activation_scale", False)),
        ("fbgemm-fp8", f"{FUSED}_scale", (FUSED, "weight_scale", False)),
        ("mxfp4", f"{FUSED}_blocks", (FUSED, "weight_blocks", True)),
        ("mxfp4", f"{FUSED}_scales", (FUSED, "weight_scales", False)),
        ("compressed-tensors", f"{UP}.weight_packed", (f"{UP}.weight", "weight_packed", True)),
        ("compressed-tensors", f"{UP}.input_global_scale", (f"{UP}.weight", "input_global_scale", False)),
        ("compressed-tensors", f"{FUSED}_input_global_scale", (FUSED, "input_global_scale", False)),
        ("modelopt", f"{UP}.weight_scale_2", (f"{UP}.weight", "weight_scale_2", False)),
        ("modelopt", f"{FUSED}_weight_scale", (FUSED, "weight_scale", False)),
        ("modelopt", f"{FUSED}_weight_scale_2", (FUSED, "weight_scale_2", False)),
        ("modelopt", f"{FUSED}_input_scale", (FUSED, "input_scale", False)),
        ("gptq", f"{UP}.qweight", (f"{UP}.weight", "qweight", True)),
        ("gptq", f"{UP}.bias", (f"{UP}.weight", "bias", False)),
        ("bitsandbytes-4bit", f"{UP}.weight.absmax", (f"{UP}.weight", "absmax", False)),
        (
            "bitsandbytes-4bit",
            f"{UP}.weight.quant_state.bitsandbytes__nf4",
            (f"{UP}.weight", "quant_state.bitsandbytes__nf4", False),
        ),
        ("bitsandbytes-8bit", f"{UP}.SCB", (f"{UP}.weight", "SCB", False)),
    ],
)
def test_companions_are_spelled_after_their_weight(name, key, expected):
    assert FORMATS[name].companion(key) == Companion(*expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "key",
    [f"{UP}.weight", FUSED, f"{FUSED}_bias", "model.layers.2.mlp.gate.e_score_correction_bias", "scale", "_scale"],
)
def test_weights_and_biases_of_the_model_are_no_companions(name, key):
    assert FORMATS[name].companion(key) is None or (name, key) == ("fp8", "scale")


def test_the_scale_of_one_format_is_nothing_in_another():
    assert FORMATS["gptq"].companion(f"{UP}.weight_scale_inv") is None
    assert FORMATS["mxfp4"].companion(f"{UP}.scales") is None
    assert FORMATS["compressed-tensors"].companion("model.layers.2.ffn.experts.3.w1.scale") is None


@pytest.mark.parametrize(
    ("shape", "expected"), [((10, 64, 2), 0), ((10,), 0), ((10, 1, 1), 0), ((), None), ((1,), None), ((1, 1), None)]
)
def test_a_fused_scale_has_an_expert_axis_or_is_one_number_for_all(shape, expected):
    companion = Companion(FUSED, "weight_scale", False)
    assert expert_dim(f"{FUSED}_scale", shape=shape, companion=companion, num_experts=10) == expected


@pytest.mark.parametrize("shape", [(1, 1, 64), (64,), (64, 10), (2, 10)])
def test_a_fused_scale_of_which_no_axis_counts_experts_is_refused(shape):
    with pytest.raises(UnsupportedModelError, match="expected 10 experts on the first axis"):
        expert_dim("x_scale", shape=shape, companion=Companion("x", "weight_scale", False), num_experts=10)


def test_packed_weights_are_never_shared_by_all_experts():
    with pytest.raises(UnsupportedModelError, match="expected 10 experts"):
        expert_dim("x_blocks", shape=(1,), companion=Companion("x", "weight_blocks", True), num_experts=10)


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [
        ("gptq", "qweight", (16, 128)), ("gptq", "scales", (16, 128)), ("gptq", "g_idx", (16,)),
        ("awq", "qzeros", (16, 2)), ("compressed-tensors", "weight_shape", (2,)),
    ],
)  # fmt: skip
def test_a_quantised_router_whose_input_axis_is_as_long_as_there_are_experts_is_not_cut_along_it(name, part, shape):
    companion = FORMATS[name].companion(f"model.layers.0.mlp.gate.{part}")
    with pytest.raises(UnsupportedModelError, match=r"does not keep the experts apart\. Prune the unquantised"):
        expert_dim("x", shape=shape, companion=companion, num_experts=shape[0])


def parts_of(scheme: str, *, experts: int = 4, weight: str = "experts.*.up_proj.weight") -> list[ExpertPart]:
    encoded = SCHEMES[scheme].encode(torch.randn(16, 32))
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}
    return [
        ExpertPart(weight, expert, part.removeprefix("weight."), names.get(tensor.dtype, "F32"))
        for expert in range(experts)
        for part, tensor in encoded.items()
    ]


def stored_by(scheme: str):
    return quantisation_of({"quantization_config": SCHEMES[scheme].config([])}).stored


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_with_all_their_tensors_pass(scheme):
    check_companions(parts_of(scheme), stored=stored_by(scheme), num_experts=4, where="folder")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_expert_without_one_of_its_companions_is_refused(scheme):
    parts = parts_of(scheme)
    for part in [part for part in parts if part.expert == 3]:
        left = [other for other in parts if other != part]
        with pytest.raises(
            CheckpointError, match=re.escape(f"expert 3 of 'experts.*.up_proj.weight' lacks {part.part}")
        ):
            check_companions(left, stored=stored_by(scheme), num_experts=4, where="folder")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_nothing_scales_are_refused_though_all_experts_agree(scheme):
    stored = stored_by(scheme)
    values = [part for part in parts_of(scheme) if part.part in ("weight", *stored.packed)]
    with pytest.raises(CheckpointError, match=f"quantised .{stored.name}. but has no"):
        check_companions(values, stored=stored, num_experts=4, where="folder")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_without_values_are_refused(scheme):
    stored = stored_by(scheme)
    scales = [part for part in parts_of(scheme) if part.part not in ("weight", *stored.packed)]
    with pytest.raises(CheckpointError, match="but no values"):
        check_companions(scales, stored=stored, num_experts=4, where="folder")


def test_an_expert_with_a_companion_too_many_is_refused():
    parts = [*parts_of("gptq"), ExpertPart("experts.*.up_proj.weight", 2, "bias", "F16")]
    with pytest.raises(CheckpointError, match=r"expert 2 of .* also has bias"):
        check_companions(parts, stored=FORMATS["gptq"], num_experts=4, where="folder")


def test_an_expert_that_was_left_unquantised_may_stand_among_quantised_ones():
    parts = [part for part in parts_of("gptq") if part.expert != 1]
    parts.append(ExpertPart("experts.*.up_proj.weight", 1, "weight", "BF16"))
    check_companions(parts, stored=FORMATS["gptq"], num_experts=4, where="folder")


def test_a_missing_expert_is_refused():
    parts = [part for part in parts_of("awq") if part.expert != 1]
    with pytest.raises(CheckpointError, match=r"1 of 4 experts are missing .*first expert 1"):
        check_companions(parts, stored=FORMATS["awq"], num_experts=4, where="folder")


def test_an_expert_beyond_the_last_is_refused():
    with pytest.raises(CheckpointError, match="has an expert 3, but the config says 3"):
        check_companions(parts_of("awq"), stored=FORMATS["awq"], num_experts=3, where="folder")


def test_fused_blocks_without_their_scales_are_refused():
    parts = [ExpertPart(FUSED, None, "weight_blocks", "U8")]
    with pytest.raises(CheckpointError, match="has no weight_scales"):
        check_companions(parts, stored=FORMATS["mxfp4"], num_experts=4, where="folder")


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "compressed-tensors", "config_groups": None, "sparsity_config": None},
        {"quant_method": "compressed-tensors", "sparsity_config": {}},
        {"quant_method": "modelopt", "quantization": None, "config_groups": None},
        {"quant_method": "gptq", "bits": None, "group_size": None},
        {"quant_method": "quark", "global_quant_config": None},
    ],
)
def test_what_a_writer_left_empty_is_no_obstacle(entry):
    assert quantisation_of({"quantization_config": entry}).bits is None


@pytest.mark.parametrize("packing", ["auto_round:nv_fp", "auto_round:mx_fp", "auto_round:fp8", "auto_round:fp8_static"])
def test_floating_point_formats_of_autoround_are_not_taken_for_gptq(packing):
    entry = {"quant_method": "auto-round", "bits": 4, "group_size": [128, 128], "packing_format": packing}
    with pytest.raises(UnsupportedModelError, match=f"stored by AutoRound as '{packing}'"):
        quantisation_of({"quantization_config": entry})


_KEYS = st.sampled_from([
    "quant_method", "config_groups", "sparsity_config", "quantization", "quant_algo", "load_in_4bit", "packing_format",
    "weight_block_size", "group_size", "bits", "w_bit", "global_quant_config", "format", "weights", "num_bits",
    "weight", "strategy", "block_structure", "dtype",
])  # fmt: skip
_METHODS = st.sampled_from([method for stored in FORMATS.values() for method in stored.methods])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | _METHODS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(entry=st.dictionaries(_KEYS, _VALUES, max_size=4), method=st.none() | _METHODS, beside=st.booleans())
@settings(deadline=None)
def test_any_quantisation_config_is_understood_or_refused(entry, method, beside):
    entry |= {"quant_method": method} if method else {}
    try:
        found = (
            quantisation_of({}, hf_quant_config=entry) if beside else quantisation_of({"quantization_config": entry})
        )
    except (CheckpointError, UnsupportedModelError):
        return
    assert found is None or found.stored in FORMATS.values()


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("entry", "title", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 block 128x128", 8),
        ({"quant_method": "fp8"}, "FP8 per tensor", 8),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "MXFP8", 8),
        ({"quant_method": "mxfp4"}, "MXFP4", 4),
        ({"quant_method": "fbgemm_fp8"}, "FP8 per channel (FBGEMM)", 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ 4-bit g128", 4),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "GPTQ 8-bit per channel", 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ 4-bit g128", 4),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "AWQ 4-bit g64", 4),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, "AutoRound 2-bit g64", 2),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes 4-bit nf4",
            4,
        ),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit", 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4 (ModelOpt)", 4),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ (ModelOpt)", 4),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION (ModelOpt)", None),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, "FP4 (Quark)", 4),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": INT4}},
            },
            "INT4 g32 (compressed-tensors)",
            4,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": FP8 | {"strategy": "channel"}}}},
            "FP8 per channel (compressed-tensors)",
            8,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "attention": {"weights": FP8 | {"strategy": "block", "block_structure": [128, 128]}},
                    "experts": {"weights": {"num_bits": 4, "type": "float"}, "format": "nvfp4-pack-quantized"},
                },
            },
            "FP8 block 128x128 + NVFP4 (compressed-tensors)",
            None,
        ),
    ],
)
def test_quantisations_are_named_as_people_name_them(entry, title, bits):
    found = quantisation_of({"quantization_config": entry})
    assert (found.title, found.bits) == (title, bits)


def test_an_unquantised_checkpoint_has_no_quantisation():
    assert quantisation_of({"model_type": "qwen3_moe"}) is None
    assert quantisation_of({"quantization_config": None, "text_config": {}}) is None


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config", "thinker_config"])
def test_the_entry_of_a_text_model_counts(key):
    entry = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT4}}}
    found = quantisation_of({key: {"quantization_config": entry}})
    assert found.title == "INT4 g32 (compressed-tensors)"


def test_the_older_key_of_compressed_tensors_counts():
    assert quantisation_of({"compression_config": {"config_groups": {"g": {"weights": INT4}}}}).bits == 4


def test_modelopts_own_file_counts_where_config_json_is_silent():
    file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    found = quantisation_of({}, hf_quant_config=file)
    assert (found.title, found.stored.name) == ("NVFP4 (ModelOpt)", "modelopt")


def test_autorounds_formats_are_told_apart_by_their_packing():
    def of(packing):
        entry = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": packing}
        return quantisation_of({"quantization_config": entry}).stored.name

    assert of("auto_round:auto_gptq") == "gptq"
    assert of("auto_round:auto_awq") == "awq"
    assert of("auto_round:llm_compressor") == "compressed-tensors"
    with pytest.raises(UnsupportedModelError, match="'itrex'"):
        of("itrex")


@pytest.mark.parametrize("method", ["hqq", "aqlm", "torchao", "quanto", "vptq", "bitnet", "something-new"])
def test_an_unknown_method_is_refused_with_the_way_out(method):
    with pytest.raises(UnsupportedModelError, match=f"'{method}'.*quantise the result"):
        quantisation_of({"quantization_config": {"quant_method": method}})


def test_a_sparse_checkpoint_is_refused():
    entry = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(UnsupportedModelError, match="sparse-24-bitmask"):
        quantisation_of({"quantization_config": entry})


@pytest.mark.parametrize(
    ("entry", "message"),
    [("fp8", "is str, expected an object"), ({"bits": 4}, "no quant_method"), ([1], "is list")],
)
def test_a_malformed_entry_is_refused(entry, message):
    with pytest.raises(CheckpointError, match=message):
        quantisation_of({"quantization_config": entry})


def test_merging_quantised_experts_is_refused_with_the_way_out():
    refuse_merge(None)
    with pytest.raises(UnsupportedModelError, match=r"FP8 block 128x128.*merge the unquantised checkpoint"):
        refuse_merge(quantisation_of({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}))


def test_no_two_formats_claim_one_method():
    methods = [method for stored in FORMATS.values() for method in stored.methods]
    assert len(methods) == len(set(methods))
    assert all(format_of(method).name == name for name, stored in FORMATS.items() for method in stored.methods)


def test_the_table_in_the_docs_is_the_one_that_the_code_goes_by():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| ") and "`quant_method`" not in line]
    for line, row in zip(table, format_rows(), strict=True):
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        assert cells == list(row.values())


def test_a_refusal_says_which_checkpoint():
    with pytest.raises(UnsupportedModelError, match=r"^/models/x: stored quantised with 'hqq'"):
        quantisation_of({"quantization_config": {"quant_method": "hqq"}}, where="/models/x")
