"""The central promise: a plan exported to disk and the same plan applied in memory are one model, bit for bit."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeprune.anatomy.source import open_source
from moeprune.apply.memory import apply_plan
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.load import load_model
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from moeprune.plan.plan import Plan
from tests.models import FAMILIES, build, save
from tests.pruning import logits, plan_for, random_plan

STORED = {
    "float32": {"dtype": torch.float32, "shard": "50GB"},
    "bfloat16 shards": {"dtype": torch.bfloat16, "shard": "40KB"},
}


def assert_same_model(source: Path, out: Path, plan: Plan) -> None:
    in_memory = apply_plan(load_model(source), plan=plan, anatomy=open_source(source).anatomy)
    on_disk = load_model(out)
    expected, found = in_memory.state_dict(), on_disk.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(logits(in_memory), logits(on_disk))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", STORED)
def test_export_equals_apply(tmp_path, family, stored):
    source = save(family, tmp_path / "source", **STORED[stored])
    assert (len(list(source.glob("*.safetensors"))) > 1) == ("shards" in stored)
    plan = plan_for(source, family)
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert_same_model(source, tmp_path / "out", plan)
    checks = verify_checkpoint(tmp_path / "out", quiet=True)
    assert [check.name for check in checks if not check.passed] == []
    assert "logits equal to the plan applied in memory" in [check.name for check in checks]


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_a_fused_checkpoint_equals_apply(tmp_path, family):
    """As transformers keeps experts in memory: one tensor a layer, which must be sliced and not renamed."""
    source = tmp_path / "source"
    build(family).save_pretrained(source, save_original_format=False, max_shard_size="60KB")
    plan = plan_for(source, family, seed=5)
    summary = export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert (summary.tensors_dropped, summary.tensors_sliced) == (0, len(open_source(source).anatomy.axes))
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(source).tensors.keys()
    assert_same_model(source, tmp_path / "out", plan)
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", quiet=True))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    plan = plan_for(tmp_path / "source", "qwen3_moe")
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(tmp_path / "source", tmp_path / "out", plan)


def test_a_lower_top_k_alone_copies_every_tensor(tmp_path):
    source = save("qwen3_moe", tmp_path / "source")
    plan = random_plan(open_source(source).facts, keep=10, top_k=1)
    summary = export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert (summary.tensors_dropped, summary.tensors_sliced) == (0, 0)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert_same_model(source, tmp_path / "out", plan)


def test_a_pruned_checkpoint_can_be_pruned_again(tmp_path):
    source = save("deepseek_v3", tmp_path / "source")
    first = random_plan(open_source(source).facts, keep=12, top_k=3, seed=1)
    export_checkpoint(source, plan=first, out=tmp_path / "once", quiet=True)
    second = random_plan(open_source(tmp_path / "once").facts, keep=8, top_k=2, seed=2)
    export_checkpoint(tmp_path / "once", plan=second, out=tmp_path / "twice", quiet=True)
    assert_same_model(tmp_path / "once", tmp_path / "twice", second)
    assert all(check.passed for check in verify_checkpoint(tmp_path / "twice", quiet=True))
    manifest = json.loads((tmp_path / "twice" / "moeprune.json").read_text())
    assert manifest["pruned_before"] == json.loads((tmp_path / "once" / "moeprune.json").read_text())
    # Both steps together are one selection from the original.
    layers = tuple(
        later.model_copy(update={"keep": tuple(earlier.keep[i] for i in later.keep)})
        for earlier, later in zip(first.layers, second.layers, strict=True)
    )
    both = first.model_copy(update={"layers": layers, "num_experts": 8, "top_k": 2})
    assert_same_model(source, tmp_path / "twice", both)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("stored", STORED)
def test_the_library_reads_the_output_and_its_data_is_aligned(tmp_path, family, stored):
    source = save(family, tmp_path / "source", **STORED[stored])
    export_checkpoint(source, plan=plan_for(source, family), out=tmp_path / "out", quiet=True)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    total = 0
    for file in files:
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            total += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    if len(files) > 1:
        assert [file.name for file in files] == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"] == {key: file.name for file in files for key in load_file(file)}


def test_shards_of_which_nothing_is_left_are_not_written(tmp_path):
    """Large checkpoints have shards that hold a few experts of one layer only."""
    source = save("olmoe", tmp_path / "source")
    by_file: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(source / "model.safetensors").items():
        expert = re.search(r"layers\.(\d+).*experts\.(\d+)", key)
        by_file[f"{'-'.join(expert.groups()) if expert else 'rest'}.safetensors"][key] = tensor
    for name, tensors in by_file.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    (source / "model.safetensors").unlink()
    weight_map = {key: name for name, tensors in by_file.items() for key in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plan = random_plan(open_source(source).facts, keep=4, top_k=2)
    summary = export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert len(by_file) == 2 * 10 + 1
    assert summary.shards == len(list((tmp_path / "out").glob("*.safetensors"))) == 2 * 4 + 1
    assert_same_model(source, tmp_path / "out", plan)
