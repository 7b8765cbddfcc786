"""What an export writes beside the tensors, what it refuses, and what a killed one leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import moeprune
from moeprune.anatomy.source import open_source
from moeprune.checkpoint.header import read_header
from moeprune.errors import ExportError, PlanError
from moeprune.export import export as export_module
from moeprune.export import prepare
from moeprune.export.copying import is_sparse
from moeprune.export.export import ExportSummary, export_checkpoint, other_files
from moeprune.export.layout import parse_size
from moeprune.export.verify import verify_checkpoint
from moeprune.plan.plan import Plan
from tests.models import FAMILIES, save
from tests.pruning import COUNTS, all_bytes, edit_config, edit_tensors, plan_for, random_plan

CARD = """---
language: [en, de]
license: other
license_name: tongyi-qianwen
license_link: https://example.com/LICENSE
pipeline_tag: text-generation
tags: [chat, moe]
---
# The original {not a format field}
"""
OTHERS = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "vocab.txt": "a\nb\n",
    "merges.txt": "",
    "tokenizer.model": "binary \x00",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modeling_custom.py": "class Custom: ...",
    "LICENSE": "do as you like",
    "preprocessor_config.json": "{}",
}
LEFT_OUT = {
    ".gitattributes": "*.safetensors filter=lfs",
    ".cache/huggingface/x.json": "{}",
    "__pycache__/modeling_custom.cpython-311.pyc": "",
    "pytorch_model.bin": "pickled",
    "pytorch_model.bin.index.json": "{}",
    "original/consolidated.00.pth": "weights",
    "original/params.json": "{}",
    "onnx/model.onnx": "weights",
    "model.gguf": "weights",
}


def dressed(folder: Path, family: str = "mixtral", *, shard: str = "50GB") -> Path:
    """A checkpoint with everything around its weights that is found on the Hub."""
    save(family, folder, shard=shard)
    for name, text in {**OTHERS, **LEFT_OUT, "README.md": CARD}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def export(source: Path, out: Path, family: str = "mixtral", **options) -> ExportSummary:
    return export_checkpoint(source, plan=plan_for(source, family), out=out, quiet=True, **options)


def refusal(source: Path, out: Path, **options) -> str:
    with pytest.raises(ExportError) as error:
        export(source, out, **options)
    return str(error.value)


# What is written


def test_files_that_belong_to_the_model_are_copied_and_other_weights_are_not(tmp_path):
    source, out = dressed(tmp_path / "source"), tmp_path / "out"
    export(source, out)
    assert all_bytes(out).keys() == {*OTHERS, "model.safetensors", "config.json", "README.md", "moeprune.json"}
    for name, text in OTHERS.items():
        assert (out / name).read_text() == text
    assert {str(path) for path in other_files(source)} == set(OTHERS)


def test_links_into_a_download_cache_become_files(tmp_path):
    """A Hub download is a folder of links; a copy of the links would break when the cache is cleaned."""
    blobs = dressed(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    for name in all_bytes(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    export(snapshot, tmp_path / "out")
    shutil.rmtree(blobs)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_changes_in_its_counts_only(tmp_path, family):
    source = save(family, tmp_path / "source")
    edit_config(source, zeta={"topk_method": "noaux_tc"}, alpha=[1, None], Ünknown="ß")
    before = json.loads((source / "config.json").read_text())
    export(source, tmp_path / "out", family)
    text = (tmp_path / "out" / "config.json").read_text()
    after = json.loads(text)
    counts = set(open_source(source).anatomy.num_experts.aliases)
    kept, top_k = COUNTS[family]
    assert list(after)[: len(before)] == list(before)
    assert after.keys() - before.keys() <= counts
    assert {after[name] for name in counts} == {kept}
    assert after["num_experts_per_tok"] == top_k
    touched = counts | {"num_experts_per_tok"}
    assert {k: v for k, v in after.items() if k not in touched} == {k: v for k, v in before.items() if k not in touched}
    assert "Ünknown" in text and "ß" in text, "no needless escapes: the file is for people, too"


def test_the_card_has_front_matter_that_the_hub_reads(tmp_path):
    source, out = dressed(tmp_path / "source"), tmp_path / "slim-model"
    export(source, out)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other"
    assert card.data.license_name == "tongyi-qianwen"
    assert card.data.license_link == "https://example.com/LICENSE"
    assert card.data.language == ["en", "de"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["chat", "moe", "expert-pruning", "moeprune"]
    assert "base_model" not in yaml.safe_load(card.content.split("---")[1]), "a local path is no model on the Hub"
    assert card.text.strip().startswith("# slim-model\n")
    assert "**4 of 6 experts** in each of its 2 expert layers" in card.text
    assert "**1 of 2 active\nexperts**" in card.text
    assert str(tmp_path) not in card.content, "paths of the machine that exported are nobody's business"


def test_the_base_of_a_local_fine_tune_stays_the_base(tmp_path):
    source = save("mixtral", tmp_path / "source")
    (source / "README.md").write_text("---\nbase_model: org/base\n---\n")
    export(source, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/base"


def test_a_source_without_a_card(tmp_path):
    source = save("mixtral", tmp_path / "source")
    export(source, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.pipeline_tag) == (None, "text-generation")
    assert data.tags == ["moe", "expert-pruning", "moeprune"]


@pytest.mark.parametrize("text", ["# only text\n", "", "---\nlicense: mit\n"])
def test_a_source_whose_card_has_no_usable_front_matter(tmp_path, text):
    source = save("mixtral", tmp_path / "source")
    (source / "README.md").write_text(text)
    export(source, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_a_card_whose_front_matter_is_damaged_is_refused_before_anything_is_written(tmp_path):
    source = save("mixtral", tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert refusal(source, tmp_path / "out") == (
        f"{source / 'README.md'}: its front matter is not YAML (while parsing a flow sequence). Mend or delete it."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_card_says_how_the_experts_were_chosen_and_warns(tmp_path):
    source = save("mixtral", tmp_path / "source")
    method = {
        "score": "reap", "formula": "mean(g |f|)", "source": "arXiv:1", "calibration_tokens": 12345,
        "domains": {"code": 0.75, "law": 0.25},
    }  # fmt: skip
    plan = plan_for(source, "mixtral").model_copy(update={"method": method, "warnings": ("too {little} text",)})
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "Saliency: `reap` (mean(g |f|); arXiv:1), on 12,345 calibration tokens, domains: code 0.75, law 0.25." in text
    )
    assert "## Warnings\n\n- too {little} text\n" in text


def test_the_manifest_tells_where_the_checkpoint_came_from(tmp_path):
    source, out = save("mixtral", tmp_path / "source", shard="30KB"), tmp_path / "out"
    plan = plan_for(source, "mixtral")
    summary = export_checkpoint(source, plan=plan, out=out, quiet=True)
    manifest = json.loads((out / "moeprune.json").read_text())
    assert Plan.model_validate(manifest["plan"]) == plan
    assert manifest["source"] == {"name": str(source), "fingerprint": plan.model.fingerprint}
    assert manifest["format"] == 1
    assert manifest["pruned_before"] is None
    assert manifest["files"].keys() == {file.name for file in out.glob("*.safetensors")}
    assert manifest["versions"].keys() == {"moeprune", "python", "torch", "transformers", "safetensors"}
    assert manifest["versions"]["moeprune"] == moeprune.__version__
    assert manifest["sizes"] == summary.to_json()["sizes"]
    stored = sum(len(data) for name, data in all_bytes(out).items() if name.endswith(".safetensors"))
    assert 0 < stored - manifest["sizes"]["bytes_after"] < 20_000, "what is left are headers"


def test_the_summary_counts_tensors(tmp_path):
    source = save("qwen3_moe", tmp_path / "source")
    summary = export(source, tmp_path / "out", "qwen3_moe")
    stored = len(open_source(source).checkpoint.tensors)
    assert summary.tensors_dropped == 2 * 3 * 3  # three experts of two layers, three projections each
    assert summary.tensors_sliced == 2  # routers
    assert summary.tensors_kept == stored - 2 - 18
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert summary.bytes_dropped == sum(map(len, before.values())) - sum(map(len, after.values()))
    routers = [len(data) for name, data in after.items() if name.endswith("mlp.gate.weight")]
    assert summary.bytes_sliced == sum(routers)
    assert summary.bytes_kept == sum(map(len, after.values())) - sum(routers)
    assert summary.files == {"model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size}
    json.dumps(summary.to_json())


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path):
    source = dressed(tmp_path / "source")
    before = all_bytes(tmp_path)
    planned = export(source, tmp_path / "deep" / "out", dry_run=True)
    assert all_bytes(tmp_path) == before
    assert not (tmp_path / "deep").exists()
    assert export(source, tmp_path / "deep" / "out") == planned


def test_files_that_the_index_does_not_name_are_reported(tmp_path):
    source = save("mixtral", tmp_path / "source", shard="30KB")
    assert export(source, tmp_path / "all").not_read == ()
    shutil.copy(source / "model-00001-of-00008.safetensors", source / "mtp.safetensors")
    assert export(source, tmp_path / "out").not_read == ("mtp.safetensors",)
    assert not (tmp_path / "out" / "mtp.safetensors").exists()


def test_the_source_is_only_read(tmp_path):
    source = dressed(tmp_path / "source")
    before = all_bytes(source)
    export(source, tmp_path / "out")
    assert all_bytes(source) == before


# Files, shards and file systems


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder, read by the safetensors library."""
    return {
        name: tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("limit", ["15KB", "70kb", "1GB"])
def test_shards_of_another_size_hold_the_same_tensors(tmp_path, limit):
    source = save("mixtral", tmp_path / "source", shard="40KB")
    export(source, tmp_path / "as-is"), export(source, tmp_path / "out", max_shard_size=limit)
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "as-is")
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", quiet=True))
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) < parse_size(limit) + 10_000, "a header more than the tensors"


def test_the_index_keeps_what_the_source_says_and_counts_anew(tmp_path):
    source = save("mixtral", tmp_path / "source", shard="40KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert "total_parameters" in index["metadata"]
    index["metadata"]["quantised_by"] = "nobody"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    summary = export(source, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "out")
    assert after["metadata"] == {
        "total_size": sum(map(len, tensors.values())),
        "total_parameters": sum(map(len, tensors.values())) // 4,
        "quantised_by": "nobody",
    }
    assert summary.sizes.parameters_after == after["metadata"]["total_parameters"]
    assert after["weight_map"].keys() == tensors.keys()


def all_experts(source: Path) -> Plan:
    """A plan that changes the number of active experts alone, so that all weights stay as they are."""
    facts = open_source(source).facts
    return random_plan(facts, keep=facts.num_experts, top_k=1)


@pytest.mark.parametrize("shard", ["50GB", "40KB"])
@pytest.mark.parametrize("link", [False, True])
def test_untouched_files_are_copied_whole_and_linked_only_if_asked(tmp_path, shard, link):
    """A linked file shares its bytes with the source: whoever edits one in place changes both."""
    source, out = save("mixtral", tmp_path / "source", shard=shard), tmp_path / "out"
    export_checkpoint(source, plan=all_experts(source), out=out, quiet=True, link=link)
    for file in source.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
        assert ((out / file.name).stat().st_ino == file.stat().st_ino) is link
    assert all(check.passed for check in verify_checkpoint(out, quiet=True))


def test_a_link_goes_to_the_file_and_not_to_a_link_in_a_download_cache(tmp_path):
    blobs = save("mixtral", tmp_path / "blobs")
    shutil.copytree(blobs, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / "model.safetensors").symlink_to(blobs / "model.safetensors")
    export_checkpoint(tmp_path / "source", plan=all_experts(blobs), out=tmp_path / "out", quiet=True, link=True)
    linked = tmp_path / "out" / "model.safetensors"
    assert not linked.is_symlink()
    assert linked.stat().st_ino == (blobs / "model.safetensors").stat().st_ino


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_linked_it_is_copied(tmp_path, monkeypatch, number):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "out"

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    export_checkpoint(source, plan=all_experts(source), out=out, quiet=True, link=True)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_changed_files_are_never_linked(tmp_path):
    source = save("mixtral", tmp_path / "source")
    before = all_bytes(source)
    export(source, tmp_path / "out", link=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1
    assert all_bytes(source) == before


MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no second file system at hand")
@pytest.mark.parametrize("link", [False, True])
def test_a_target_on_another_file_system(tmp_path, link):
    source = save("mixtral", tmp_path / "source", shard="40KB")
    if source.stat().st_dev == MEMORY.stat().st_dev:
        pytest.skip("the temporary folder is in memory, too")
    export(source, tmp_path / "here")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        export(source, Path(folder) / "here", link=link)
        assert all_bytes(Path(folder) / "here") == all_bytes(tmp_path / "here")


@pytest.fixture
def sparse(tmp_path) -> Path:
    """A checkpoint of 20 MB of which only the header is stored: a rehearsal of one that would not fit the disk."""
    folder = tmp_path / "sparse"
    config = FAMILIES["mixtral"]()
    config.hidden_size, config.intermediate_size = 256, 512
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    size, start = file.stat().st_size, min(tensor.start for tensor in read_header(file)[0].values())
    os.truncate(file, start)
    os.truncate(file, size)
    if not is_sparse(file.stat()):
        pytest.skip("this file system stores zeros")
    return folder


def test_a_sparse_checkpoint_gives_a_sparse_checkpoint(sparse, tmp_path):
    summary = export(sparse, tmp_path / "out")
    written = tmp_path / "out" / "model.safetensors"
    assert written.stat().st_size == summary.files["model.safetensors"] > 10_000_000
    assert written.stat().st_blocks * 512 < 500_000
    assert not any(any(data) for data in tensors_of(tmp_path / "out").values())


def test_a_sparse_checkpoint_needs_only_the_space_that_it_stores(sparse, tmp_path, monkeypatch):
    assert bytes_asked_for(sparse, tmp_path / "out", monkeypatch) < 500_000
    dense = tmp_path / "dense"
    shutil.copytree(sparse, dense)
    (dense / "model.safetensors").write_bytes((sparse / "model.safetensors").read_bytes())
    written = sum(map(len, tensors_of(sparse).values()))
    assert written / 2 < bytes_asked_for(dense, tmp_path / "out", monkeypatch) < written


def bytes_asked_for(source: Path, out: Path, monkeypatch) -> int:
    """The bytes that an export asks of the disk."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "check_space", lambda out, needed, **rest: asked.append(needed))
        export(source, out, dry_run=True)
    return asked[0]


# What is refused


def test_an_existing_folder_needs_force(tmp_path):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "out"
    export(source, out)
    before = all_bytes(out)
    assert refusal(source, out) == f"{out}: exists. Choose another folder, or replace it with --force."
    assert refusal(source, out, dry_run=True) == f"{out}: exists. Choose another folder, or replace it with --force."
    assert all_bytes(out) == before
    (out / "stale.txt").touch()
    export(source, out, force=True)
    assert all_bytes(out) == before


def test_an_empty_folder_can_be_replaced(tmp_path):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    assert refusal(source, out) == f"{out}: exists. Choose another folder, or replace it with --force."
    export(source, out, force=True)
    assert (out / "config.json").is_file()


def test_force_does_not_delete_what_moeprune_did_not_write(tmp_path):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")
    assert refusal(source, out, force=True) == (
        f"{out}: --force replaces only checkpoints that moeprune wrote, and this is not one. Delete it."
    )
    assert (out / "chapter1.tex").read_text() == "years of work"


def test_force_does_not_delete_a_file(tmp_path):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "notes"
    out.write_text("text")
    assert refusal(source, out, force=True) == (
        f"{out}: --force replaces only checkpoints that moeprune wrote, and this is not one. Delete it."
    )
    assert out.read_text() == "text"


@pytest.mark.parametrize("where", [".", "pruned", "..", "../source", "../other/../source/x"])
def test_a_target_in_or_around_the_source(tmp_path, where):
    source = save("mixtral", tmp_path / "parent" / "source")
    before = all_bytes(tmp_path)
    out = source / where
    assert refusal(source, out, force=True) == (f"{out}: lies in or around the source {source}. Choose another folder.")
    assert all_bytes(tmp_path) == before


def test_a_sibling_whose_name_begins_like_the_source_is_not_inside_it(tmp_path):
    source = save("mixtral", tmp_path / "model")
    export(source, tmp_path / "model-pruned")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "new" / "out"
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(9, 9, 2048))
    needed = 4 * (2 * (4 * 3 * 32 * 24 + 4 * 32) + 2 * 97 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32) + 32)
    assert refusal(source, out) == f"{out}: needs {needed / 1024:.3g} KiB, only 2.00 KiB are free on that disk."
    assert asked == [tmp_path]
    assert not out.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, needed))
    export(source, out)


def test_a_plan_for_other_weights_of_the_same_shape(tmp_path):
    source, other = save("mixtral", tmp_path / "a"), save("mixtral", tmp_path / "b", seed=1)
    plan = plan_for(other, "mixtral")
    with pytest.raises(PlanError) as error:
        export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    here = open_source(source).facts.fingerprint
    assert str(error.value) == (
        f"the plan was made for {other} ({plan.model.fingerprint[:12]}), this is {source} ({here[:12]}): "
        "other weights or another config. Calibrate and plan for this model."
    )
    assert not (tmp_path / "out").exists()


# What a killed export leaves


class Killed(BaseException):
    """Stands for a signal: nothing in the library may catch it."""


def test_an_export_killed_between_shards_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    source, out = dressed(tmp_path / "source", shard="30KB"), tmp_path / "out"
    from moeprune.export import shards

    real, written = shards._write_shard, []

    def die_at_the_second(shard, path, *args):
        if written:
            raise Killed
        written.append(path)
        return real(shard, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", die_at_the_second)
        with pytest.raises(Killed):
            export(source, out, jobs=1)
    partial = tmp_path / "out.partial"
    assert not out.exists()
    assert list(partial.glob("*.safetensors")) == written
    assert not (partial / "config.json").exists()
    (partial / "left-over.txt").touch()
    export(source, out)
    assert not partial.exists()
    assert not (out / "left-over.txt").exists()
    assert all(check.passed for check in verify_checkpoint(out, quiet=True))


@pytest.mark.parametrize("step", ["write_card", "write_json", "write_shards"])
def test_an_export_killed_at_any_step_keeps_the_checkpoint_that_it_was_to_replace(tmp_path, monkeypatch, step):
    source, out = dressed(tmp_path / "source"), tmp_path / "out"
    export(source, out)
    before = all_bytes(out)

    def die(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(export_module, step, die)
    with pytest.raises(Killed):
        export(source, out, force=True)
    assert all_bytes(out) == before
    assert not (tmp_path / "out.partial" / "config.json").exists()


def test_pruning_again_records_the_earlier_pruning_and_keeps_the_card(tmp_path):
    source = dressed(tmp_path / "source")
    export(source, tmp_path / "once")
    again = random_plan(open_source(tmp_path / "once").facts, keep=2, top_k=1)
    export_checkpoint(tmp_path / "once", plan=again, out=tmp_path / "twice", quiet=True)
    manifest = json.loads((tmp_path / "twice" / "moeprune.json").read_text())
    assert manifest["pruned_before"]["source"]["name"] == str(source)
    assert manifest["source"]["name"] == str(tmp_path / "once")
    data = ModelCard.load(tmp_path / "twice" / "README.md").data
    assert (data.license, data.tags) == ("other", ["chat", "moe", "expert-pruning", "moeprune"])


def test_a_bare_relative_folder_name_works(tmp_path, monkeypatch):
    save("mixtral", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    export(Path("source"), Path("out"))
    assert verify_checkpoint(Path("out"), quiet=True)[-1].passed


def test_tensors_that_no_plan_touches_are_kept_even_if_transformers_does_not_know_them(tmp_path):
    source = save("deepseek_v3", tmp_path / "source")
    import torch

    extra = "model.layers.3.eh_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({extra: torch.randn(3, 5)}))
    export(source, tmp_path / "out", "deepseek_v3")
    assert extra in open_source(tmp_path / "out").checkpoint.tensors
