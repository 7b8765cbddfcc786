"""A plan applied layer by layer is the plan applied in memory, and the exported checkpoint, bit for bit."""

import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.apply.memory import apply_plan
from moeprune.calibrate.streaming.logits import stream_logits
from moeprune.checkpoint.load import align_memory, load_model
from moeprune.errors import PlanError
from moeprune.export.export import export_checkpoint
from tests.calibrate.streaming.both import text
from tests.formats import save_quantised
from tests.models import FAMILIES, save
from tests.pruning import plan_for, random_plan
from tests.test_families import build

BATCHES = [text(padded=False)[0].select(slice(begin, begin + 2)).inputs() for begin in (0, 2)]
# Experts that are modules of their own, several sets of experts a layer, expert ids as values, extra router rows.
UNUSUAL = ("jamba", "ernie4_5_vl_moe", "deepseek_v4", "zaya", "jetmoe", "longcat_flash")


def assert_alike(folder, plan, out) -> None:
    source = open_source(folder)
    streamed = stream_logits(source, batches=BATCHES, plan=plan)
    in_memory = apply_plan(load_model(folder), plan=plan, anatomy=source.anatomy)
    align_memory(in_memory)
    export_checkpoint(folder, plan=plan, out=out, quiet=True)
    exported = stream_logits(open_source(out), batches=BATCHES)
    with torch.inference_mode():
        expected = [in_memory(**batch, use_cache=False).logits for batch in BATCHES]
    for found, from_disk, whole in zip(streamed, exported, expected, strict=True):
        assert found.equal(from_disk)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    original = stream_logits(source, batches=BATCHES)
    assert not original[0].equal(streamed[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    save(family, tmp_path / "source")
    assert_alike(tmp_path / "source", plan_for(tmp_path / "source", family), tmp_path / "out")


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_experts(tmp_path, name):
    build(name).save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    top_k = source.anatomy.top_k
    plan = random_plan(source.facts, keep=9, top_k=top_k.value if top_k.fixed else 2)
    assert_alike(tmp_path / "source", plan, tmp_path / "out")


@pytest.mark.parametrize("scheme", ["fp8-block", "ct-int4"])
def test_quantised_experts(tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    save_quantised("qwen3_moe", tmp_path / "source", scheme)
    assert_alike(tmp_path / "source", plan_for(tmp_path / "source", "qwen3_moe"), tmp_path / "out")


def test_a_plan_of_another_model(tmp_path):
    save("mixtral", tmp_path / "source")
    save("qwen3_moe", tmp_path / "other")
    plan = plan_for(tmp_path / "other", "qwen3_moe")
    with pytest.raises(PlanError):
        stream_logits(open_source(tmp_path / "source"), batches=BATCHES, plan=plan)
