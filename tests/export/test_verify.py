"""Verification finds each kind of damage and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import PlanError, VerifyError
from moeprune.export import verify as verify_module
from moeprune.export.behaviour import check_streamed
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import Check, verify_checkpoint
from moeprune.plan.plan import Plan
from tests.formats import save_quantised
from tests.models import build, save
from tests.pruning import edit_config, edit_tensors, plan_for

BYTES = "every tensor byte for byte"
PASSED = [
    "layout", "config", "strict reload", "source", BYTES, "logits equal to the plan applied in memory", "generation",
]  # fmt: skip


def exported(folder: Path, family: str = "qwen3_moe", *, fused: bool = False) -> tuple[Path, Path, Plan]:
    source, out = folder / "source", folder / "out"
    if fused:
        build(family).save_pretrained(source, save_original_format=False)
    else:
        save(family, source)
    plan = plan_for(source, family)
    export_checkpoint(source, plan=plan, out=out, quiet=True)
    return source, out, plan


def failures(out: Path, **options) -> list[tuple[str, str]]:
    return [(c.name, c.detail) for c in verify_checkpoint(out, quiet=True, **options) if not c.passed]


def flip_byte(folder: Path, key: str, offset: int) -> None:
    """Flip the lowest bit of one byte of a tensor: the smallest damage there is."""
    info = open_checkpoint(folder).tensors[key]
    with info.file.open("r+b") as file:
        file.seek(info.start + offset)
        value = file.read(1)[0]
        file.seek(info.start + offset)
        file.write(bytes([value ^ 1]))


def test_a_faithful_export_passes_every_check(tmp_path):
    _, out, _ = exported(tmp_path)
    checks = verify_checkpoint(out, quiet=True)
    assert [check.name for check in checks] == PASSED
    assert all(check.passed for check in checks)
    num_bytes = open_checkpoint(out).num_bytes
    assert checks[1].detail == "7 experts, top-2, under every name that readers look for"
    assert checks[4].detail == f"{len(open_checkpoint(out).tensors)} tensors, {num_bytes:,} bytes"
    assert checks[5].detail == "largest difference 0 over 130 tokens"
    assert checks[0].to_json() == {
        "name": "layout", "passed": True, "detail": "every tensor that the config asks for is stored",
    }  # fmt: skip


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.2.mlp.experts.6.down_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("offset", [0, 101])
def test_one_flipped_bit(tmp_path, key, offset):
    _, out, plan = exported(tmp_path)
    flip_byte(out, key, offset)
    original = key
    if ".experts." in key:
        original = key.replace(".experts.6.", f".experts.{plan.keep['model.layers.2'][6]}.")
    assert failures(out) == [(BYTES, f"{key!r} differs from {original!r} of the source")]


def test_a_flipped_sign_of_zero_is_a_difference(tmp_path):
    """0.0 == -0.0, so comparing values would not see it."""
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "out"
    edit_tensors(source, lambda tensors: tensors["lm_head.weight"].zero_())
    export_checkpoint(source, plan=plan_for(source, "mixtral"), out=out, quiet=True)
    edit_tensors(out, lambda tensors: tensors["lm_head.weight"].neg_())
    assert failures(out) == [(BYTES, "'lm_head.weight' differs from 'lm_head.weight' of the source")]


def test_a_nan_that_was_there_before_is_no_difference(tmp_path):
    source, out = save("mixtral", tmp_path / "source"), tmp_path / "out"
    edit_tensors(source, lambda tensors: tensors["lm_head.weight"][3].fill_(float("nan")))
    export_checkpoint(source, plan=plan_for(source, "mixtral"), out=out, quiet=True)
    assert BYTES not in [name for name, _ in failures(out)]
    assert ("finite logits", "the pruned model gives NaN or infinity") in failures(out)


def test_two_experts_exchanged(tmp_path):
    """Every tensor is a true copy, and strict loading is content; the router sends tokens to the wrong expert."""
    _, out, plan = exported(tmp_path)

    def exchange(tensors):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            a, b = (f"model.layers.0.mlp.experts.{i}.{projection}.weight" for i in (1, 4))
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_tensors(out, exchange)
    ((name, detail),) = failures(out)
    assert name == BYTES
    assert detail.startswith("'model.layers.0.mlp.experts.1.")
    assert f" differs from 'model.layers.0.mlp.experts.{plan.keep['model.layers.0'][1]}." in detail


def test_two_rows_of_a_fused_tensor_exchanged(tmp_path):
    _, out, _ = exported(tmp_path, fused=True)
    key = "model.layers.2.mlp.experts.down_proj"
    edit_tensors(out, lambda tensors: tensors.update({key: tensors[key][[1, 0, 2, 3, 4, 5, 6]]}))
    assert failures(out) == [(BYTES, f"{key!r} differs from {key!r} of the source")]


@pytest.mark.parametrize("alias", ["num_experts", "num_local_experts"])
def test_one_stale_alias_in_the_config(tmp_path, alias):
    """transformers reads the other name, but an older one or an engine would build the model with 10 experts."""
    _, out, _ = exported(tmp_path)
    edit_config(out, **{alias: 10})
    found = failures(out)
    assert found
    assert any("10" in detail for _, detail in found)


def test_a_missing_alias_in_the_config(tmp_path):
    """transformers 4 assumes 128 experts where `num_experts` is missing."""
    _, out, _ = exported(tmp_path)
    config = json.loads((out / "config.json").read_text())
    del config["num_experts"]
    (out / "config.json").write_text(json.dumps(config))
    assert failures(out) == [("config", "num_experts is None, the plan says 7")]


def test_a_top_k_that_was_not_lowered(tmp_path):
    _, out, _ = exported(tmp_path)
    edit_config(out, num_experts_per_tok=3)
    assert failures(out) == [("config", "num_experts_per_tok is 3, the plan says 2")]


def test_a_stale_count_under_a_name_that_transformers_ignores(tmp_path):
    source = save("gpt_oss", tmp_path / "source")
    edit_config(source, experts_per_token=3)
    export_checkpoint(source, plan=plan_for(source, "gpt_oss"), out=tmp_path / "out", quiet=True)
    assert failures(tmp_path / "out") == []
    edit_config(tmp_path / "out", experts_per_token=3)
    ((name, detail),) = failures(tmp_path / "out")
    assert name == "layout" and "num_experts_per_tok = 2 and experts_per_token = 3 contradict each other" in detail


@pytest.mark.parametrize("key", ["model.layers.2.mlp.gate.weight", "model.norm.weight"])
def test_a_missing_tensor(tmp_path, key):
    _, out, _ = exported(tmp_path)
    edit_tensors(out, lambda tensors: tensors.pop(key))
    assert failures(out) == [
        ("layout", f"{out}: no stored tensor for {key!r} of the model. Download the checkpoint again."),
        (BYTES, f"{key!r} is missing"),
    ]


@pytest.mark.parametrize("scheme", ["gptq", "awq", "bnb-nf4", "modelopt-nvfp4", "ct-nvfp4"])
def test_experts_that_transformers_cannot_run_are_compared_byte_for_byte(tmp_path, scheme):
    save_quantised("qwen3_moe", tmp_path / "source", scheme)
    export_checkpoint(
        tmp_path / "source", plan=plan_for(tmp_path / "source", "qwen3_moe"), out=tmp_path / "out", quiet=True
    )
    checks = verify_checkpoint(tmp_path / "out", quiet=True)
    assert [check.name for check in checks] == ["layout", "config", "strict reload", "source", BYTES]
    assert all(check.passed for check in checks)
    assert checks[2].detail.startswith("not made, nor are logits compared: ")
    key = next(key for key in open_checkpoint(tmp_path / "out").tensors if "experts.3." in key)
    flip_byte(tmp_path / "out", key, 0)
    assert [name for name, _ in failures(tmp_path / "out")] == [BYTES]


def test_a_source_that_does_not_load_either_is_compared_byte_for_byte(tmp_path):
    """A format that this release of its library no longer reads."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_quantised("qwen3_moe", source, "ct-int4-asymmetric")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "of another time"
    (source / "config.json").write_text(json.dumps(config))
    export_checkpoint(source, plan=plan_for(source, "qwen3_moe"), out=out, quiet=True)
    checks = {check.name: check for check in verify_checkpoint(out, quiet=True)}
    assert checks["strict reload"].passed
    assert checks["strict reload"].detail.startswith(
        f"not made, nor are logits compared, as for the source: {source}: does not load: "
    )
    assert "\n" not in checks["strict reload"].detail
    assert checks["every tensor byte for byte"].passed


def test_models_without_room_run_layer_by_layer(tmp_path, monkeypatch):
    _, out, _ = exported(tmp_path)
    monkeypatch.setattr(verify_module, "no_room", lambda *sources, device: "too large")
    monkeypatch.setattr(verify_module, "load_model", None)
    checks = verify_checkpoint(out, quiet=True)
    assert [(check.name, check.detail) for check in checks[4:]] == [
        ("strict reload", "layer by layer: too large"),
        ("logits equal to the plan applied in memory", "largest difference 0 over 130 tokens"),
    ]
    assert all(check.passed for check in checks)
    other = plan_for(tmp_path / "source", "qwen3_moe", seed=1)
    found, source = open_source(out), open_source(tmp_path / "source")
    reload, compared = check_streamed(found, source, plan=other, device="cpu", why="too large")
    assert reload.passed and not compared.passed


def test_a_file_that_ends_early_is_found_layer_by_layer(tmp_path):
    _, out, plan = exported(tmp_path)
    result = open_source(out)
    edit_tensors(out, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    (check,) = check_streamed(result, None, plan=plan, device="cpu", why="too large")
    assert (check.name, check.passed) == ("strict reload", False) and "model.safetensors: ends inside" in check.detail


def test_an_extra_tensor(tmp_path):
    _, out, _ = exported(tmp_path)
    edit_tensors(out, lambda tensors: tensors.update({"model.layers.0.surprise": torch.zeros(2)}))
    assert (BYTES, "1 tensors that the source does not explain, first 'model.layers.0.surprise'") in failures(out)


def test_an_extra_expert_that_the_loader_would_ignore_or_choke_on(tmp_path):
    _, out, _ = exported(tmp_path)
    key = "model.layers.0.mlp.experts.7.up_proj.weight"
    edit_tensors(out, lambda tensors: tensors.update({key: torch.zeros(24, 32)}))
    assert (BYTES, f"1 tensors that the source does not explain, first {key!r}") in failures(out)


def test_another_dtype_with_the_same_values_is_a_difference(tmp_path):
    _, out, _ = exported(tmp_path)
    key = "model.norm.weight"
    edit_tensors(out, lambda tensors: tensors.update({key: tensors[key].bfloat16()}))
    assert (BYTES, f"{key!r} differs from {key!r} of the source") in failures(out)


def test_a_truncated_shard(tmp_path):
    _, out, _ = exported(tmp_path)
    file = out / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    ((name, detail),) = failures(out)
    assert name == "files"
    assert detail.endswith(f" ends at byte {size}, the file at {size - 1}. Download it again.")


def test_another_source_of_the_same_shape(tmp_path):
    _, out, plan = exported(tmp_path)
    other = save("qwen3_moe", tmp_path / "other", seed=1)
    found = dict(failures(out, against=other))
    fingerprint = open_checkpoint(other).fingerprint()
    assert found["source"] == f"{other} ({fingerprint[:12]}): the plan was made for {plan.model.fingerprint[:12]}"
    assert "differs from" in found[BYTES]


def test_a_source_of_another_family(tmp_path):
    _, out, _ = exported(tmp_path)
    other = save("mixtral", tmp_path / "other")
    assert [name for name, _ in failures(out, against=other)] == ["source"]


def test_a_checkpoint_compared_with_itself(tmp_path):
    """An easy slip on the command line; the plan's expert numbers do not exist there."""
    _, out, _ = exported(tmp_path)
    assert [name for name, _ in failures(out, against=out)] == ["source"]


def test_a_plan_that_keeps_other_experts(tmp_path):
    source, out, plan = exported(tmp_path)
    other = plan_for(source, "qwen3_moe", seed=9)
    assert other.keep != plan.keep
    assert [name for name, _ in failures(out, plan=other)] == [BYTES]


def test_a_plan_with_other_counts(tmp_path):
    _, out, plan = exported(tmp_path)
    lower = plan.model_copy(update={"top_k": 1})
    assert failures(out, plan=lower) == [("config", "num_experts_per_tok is 2, the plan says 1")]


def test_logits_that_differ_fail_even_if_every_byte_is_right(tmp_path, monkeypatch):
    """The last line of defence: the config changed in a way that no count shows."""
    _, out, _ = exported(tmp_path)
    edit_config(out, norm_topk_prob=False)
    ((name, detail),) = failures(out)
    assert name == "logits equal to the plan applied in memory"
    assert detail.startswith("largest difference ")


def test_without_its_source_it_says_that_nothing_was_compared(tmp_path):
    source, out, _ = exported(tmp_path)
    shutil.rmtree(source)
    checks = verify_checkpoint(out, quiet=True)
    assert all(check.passed for check in checks)
    detail = f"not made: {source} is not at hand (--against)"
    assert Check("comparison with the source", True, detail) in checks
    assert [check.name for check in checks] == [
        "layout",
        "config",
        "strict reload",
        "files as they were written",
        "comparison with the source",
        "generation",
    ]


@pytest.mark.parametrize("damage", ["flipped", "renamed", "gone"])
def test_without_its_source_a_file_that_changed_since_the_export_is_found(tmp_path, damage):
    source, out, _ = exported(tmp_path)
    shutil.rmtree(source)
    manifest = json.loads((out / "moeprune.json").read_text())
    [(file, entry)] = manifest["files"].items()
    if damage == "flipped":
        data = bytearray((out / file).read_bytes())
        data[-1] ^= 1
        (out / file).write_bytes(data)
        expected = f"{file} has another xxh3_128 hash than moeprune.json says"
    else:
        manifest["files"] = {"other.safetensors": entry} if damage == "renamed" else {file: entry, "z": entry}
        (out / "moeprune.json").write_text(json.dumps(manifest))
        expected = f"{file} is not in moeprune.json" if damage == "renamed" else "z is only in moeprune.json"
    failed = [check for check in verify_checkpoint(out, quiet=True) if not check.passed]
    assert failed == [Check("files as they were written", False, expected)]


def test_without_source_and_record_nothing_is_compared(tmp_path):
    source, out, plan = exported(tmp_path)
    shutil.rmtree(source)
    (out / "moeprune.json").unlink()
    checks = verify_checkpoint(out, plan=plan, quiet=True)
    assert "files as they were written" not in {check.name for check in checks}
    assert all(check.passed for check in checks)


def test_a_source_that_moved_is_given_by_against(tmp_path):
    source, out, _ = exported(tmp_path)
    source.rename(tmp_path / "moved")
    assert [check.name for check in verify_checkpoint(out, against=tmp_path / "moved", quiet=True)] == PASSED
    assert failures(out, against=tmp_path / "moved") == []


def test_an_against_that_is_not_there(tmp_path):
    _, out, _ = exported(tmp_path)
    assert failures(out, against="./nowhere") == [
        ("files", "./nowhere: no such folder. Give the folder of a checkpoint, a Hub id (owner/name) or 'demo'.")
    ]


def test_a_folder_that_moeprune_did_not_write(tmp_path):
    save("mixtral", tmp_path)
    with pytest.raises(VerifyError) as error:
        verify_checkpoint(tmp_path, quiet=True)
    assert str(error.value) == f"{tmp_path}: no moeprune.json. Give the plan with --plan."


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_a_folder_that_is_not_there(tmp_path, kind):
    if kind == "file":
        (tmp_path / "out").write_text("{}")
    with pytest.raises(VerifyError) as error:
        verify_checkpoint(tmp_path / "out", quiet=True)
    assert str(error.value) == (f"{tmp_path / 'out'}: no such folder. Give a checkpoint that `moeprune export` wrote.")


def test_a_plan_can_be_given_where_the_manifest_is_gone(tmp_path):
    _, out, plan = exported(tmp_path)
    (out / "moeprune.json").unlink()
    assert failures(out, plan=plan) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"plan": {"format": 99}}'])
def test_a_damaged_manifest_is_an_error_for_people(tmp_path, text):
    _, out, _ = exported(tmp_path)
    (out / "moeprune.json").write_text(text)
    with pytest.raises(VerifyError) as error:
        verify_checkpoint(out, quiet=True)
    assert str(error.value) == (
        f"{out / 'moeprune.json'}: not a manifest that this version of moeprune reads. Give the plan with --plan."
    )


def test_a_manifest_with_an_impossible_plan(tmp_path):
    _, out, _ = exported(tmp_path)
    manifest = json.loads((out / "moeprune.json").read_text())
    manifest["plan"]["num_experts"] = 6
    (out / "moeprune.json").write_text(json.dumps(manifest))
    with pytest.raises(PlanError, match="keeps 7 experts, the plan says 6"):
        verify_checkpoint(out, quiet=True)


def test_verifying_reads_tensors_with_another_library_than_the_exporter(monkeypatch, tmp_path):
    """Otherwise a mistake of the exporter's own byte arithmetic would be made twice."""
    _, out, _ = exported(tmp_path)
    used = []
    real = verify_module._reader
    monkeypatch.setattr(verify_module, "_reader", lambda stack: used.append(real(stack)) or used[-1])
    verify_checkpoint(out, quiet=True)
    assert used
    assert not hasattr(verify_module, "OutputTensor")
