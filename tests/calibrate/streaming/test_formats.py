"""Quantised and fused checkpoints, streamed: dequantised a layer at a time to what transformers loads."""

import pytest
import transformers

from moeprune.anatomy.source import open_source
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.checkpoint.load import align_memory, load_model
from moeprune.errors import CheckpointError, UnsupportedModelError
from tests.calibrate.streaming.both import assert_equal_stats, text, whole_stats
from tests.formats import save_mxfp4, save_quantised
from tests.models import build, save

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")


def assert_streams_alike(folder) -> None:
    source = open_source(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    align_memory(model)
    whole = whole_stats(source, model.eval(), text(), statistics="merge")
    assert_equal_stats(stream_stats(source, rows=text(), batch_size=2, quiet=True, statistics="merge"), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-static"])
def test_fp8(tmp_path, family, scheme):
    save_quantised(family, tmp_path, scheme)
    assert_streams_alike(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["ct-fp8-channel", "ct-fp8-tensor", "ct-int4"])
def test_compressed_tensors(tmp_path, family, scheme):
    pytest.importorskip("compressed_tensors")
    save_quantised(family, tmp_path, scheme)
    assert_streams_alike(tmp_path)


def test_experts_whose_global_scale_transformers_leaves_out_are_refused(tmp_path):
    """Dequantised by transformers 5.23, NVFP4 experts are too large by that scale, here a factor of thousands."""
    save_quantised("qwen3_moe", tmp_path, "ct-nvfp4")
    with pytest.raises(UnsupportedModelError, match=r"leaves scales such as '.*weight_global_scale' out"):
        stream_stats(open_source(tmp_path), rows=text(), batch_size=2, quiet=True)
    with pytest.raises(CheckpointError, match=r"leaves scales such as '.*weight_global_scale' out"):
        load_model(tmp_path)


def test_mxfp4(tmp_path):
    save_mxfp4(tmp_path)
    assert_streams_alike(tmp_path)


@pytest.mark.parametrize("scheme", ["awq", "gptq", "modelopt-nvfp4", "bnb-nf4"])
def test_a_format_that_transformers_does_not_dequantise_is_refused(tmp_path, scheme):
    save_quantised("qwen3_moe", tmp_path, scheme)
    with pytest.raises(UnsupportedModelError, match=r"which transformers does not dequantise"):
        stream_stats(open_source(tmp_path), rows=text(), batch_size=2, quiet=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_all_experts_of_a_layer_in_one_tensor(tmp_path, family):
    build(family).save_pretrained(tmp_path, save_original_format=False)
    assert_streams_alike(tmp_path)


def test_a_checkpoint_in_many_shards(tmp_path):
    save("qwen3_moe", tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert_streams_alike(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_than_the_stored_one(tmp_path, dtype):
    """Correction biases stay in float32, as transformers keeps them."""
    save("deepseek_v3", tmp_path)
    source = open_source(tmp_path)
    whole = whole_stats(source, load_model(tmp_path, dtype=dtype), text())
    streamed = stream_stats(source, rows=text(), batch_size=2, dtype=dtype, quiet=True, run={"dtype": "as asked for"})
    assert_equal_stats(streamed, whole)
    assert streamed.runs[0]["dtype"] == dtype
