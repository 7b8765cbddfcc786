"""Verification finds what is wrong with a pruned GGUF file; inspection says what is in one."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from moeprune.errors import VerifyError
from moeprune.gguf.export import export_gguf
from moeprune.gguf.inspect import describe_gguf, inspect_gguf
from moeprune.gguf.verify import verify_gguf
from tests.gguf.files import EXPERTS, FAMILIES, FF, HIDDEN, TOP_K, keep_of, plan_for, write_model

QWEN = FAMILIES["qwen3moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_exported_passes(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, out = write_model(tmp_path / "source.gguf", family), tmp_path / "out.gguf"
    export_gguf(source, plan=plan_for(family, keep=keep_of(family)), out=out, quiet=True)
    checks = verify_gguf(out, against=source, quiet=True)
    assert all(check.passed for check in checks), checks
    tensors = GGUFReader(out).tensors
    assert checks[-1].detail == f"{len(tensors)} tensors, {sum(tensor.n_bytes for tensor in tensors):,} bytes"


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, Path]:
    source, out = write_model(tmp_path / "source.gguf", QWEN), tmp_path / "out.gguf"
    export_gguf(source, plan=plan_for(QWEN), out=out, quiet=True)
    return source, out


def failure(out: Path, source: Path, **options: object) -> str:
    """Name and detail of the one check that fails."""
    (failed,) = [check for check in verify_gguf(out, against=source, quiet=True, **options) if not check.passed]  # type: ignore[arg-type]
    return f"{failed.name}: {failed.detail}"


@pytest.mark.parametrize("name", ["blk.0.ffn_down_exps.weight", "blk.2.ffn_gate_inp.weight", "token_embd.weight"])
def test_one_flipped_bit_is_found(name: str, exported: tuple[Path, Path]) -> None:
    source, out = exported
    tensor = next(tensor for tensor in GGUFReader(out).tensors if tensor.name == name)
    data = bytearray(out.read_bytes())
    data[tensor.data_offset + tensor.n_bytes - 1] ^= 1
    out.write_bytes(data)
    assert failure(out, source) == f"every tensor byte for byte: {name!r} differs from {name!r} of the source"


def test_other_metadata_is_found(exported: tuple[Path, Path]) -> None:
    source, out = exported
    data = out.read_bytes()
    assert data.count("straße".encode()) == 1
    out.write_bytes(data.replace("straße".encode(), "Straße".encode()))
    assert failure(out, source) == "all other metadata byte for byte: 1 entries differ, first 'tokenizer.ggml.tokens'"


def test_experts_of_another_plan_are_found(exported: tuple[Path, Path]) -> None:
    source, out = exported
    assert "'blk.0." in failure(out, source, plan=plan_for(QWEN, seed=99))


def test_counts_of_another_plan_are_found(exported: tuple[Path, Path]) -> None:
    source, out = exported
    found = failure(out, source, plan=plan_for(QWEN, keep=7, top_k=1))
    assert found == "counts: 7 experts, top-2, 1 group; the plan says 7 experts, top-1, 1 group"


def test_another_number_of_groups_in_use_is_found(tmp_path: Path) -> None:
    family = FAMILIES["deepseek2"]
    source, out = write_model(tmp_path / "source.gguf", family), tmp_path / "out.gguf"
    export_gguf(source, plan=plan_for(family, keep=keep_of(family)), out=out, quiet=True)
    key, data = b"deepseek2.expert_group_used_count" + (4).to_bytes(4, "little"), out.read_bytes()
    assert data.count(key + (2).to_bytes(4, "little")) == 1
    out.write_bytes(data.replace(key + (2).to_bytes(4, "little"), key + (1).to_bytes(4, "little")))
    assert failure(out, source).startswith("counts: ")
    assert "1 of 3 groups; the plan says" in failure(out, source)


def test_a_truncated_result_is_found(exported: tuple[Path, Path]) -> None:
    source, out = exported
    out.write_bytes(out.read_bytes()[:-5000])
    assert "Download it again" in failure(out, source)


def test_the_source_must_be_named(exported: tuple[Path, Path]) -> None:
    with pytest.raises(VerifyError, match="--against"):
        verify_gguf(exported[1], against=None)


def test_a_file_without_a_plan_needs_one(exported: tuple[Path, Path]) -> None:
    with pytest.raises(VerifyError, match=r"carries no moeprune\.plan\. Give the plan with --plan"):
        verify_gguf(exported[0], against=exported[0])


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    family = FAMILIES["glm4moe with multi-token prediction"]
    source = write_model(tmp_path / "source.gguf", family)
    facts = inspect_gguf(source)
    tensors = GGUFReader(source).tensors
    experts = [tensor for tensor in tensors if "_exps" in tensor.name]
    assert facts["parameters"]["total"] == sum(tensor.n_elements for tensor in tensors)
    assert facts["parameters"]["routed_experts"] == 3 * 3 * EXPERTS * FF * HIDDEN
    assert facts["bytes"]["routed_experts"] == sum(tensor.n_bytes for tensor in experts)
    assert facts["bytes"]["an_expert"] * EXPERTS * 3 == facts["bytes"]["routed_experts"]
    trunk = sum(tensor.n_elements for tensor in tensors if not tensor.name.startswith("blk.3."))
    assert facts["parameters"]["active"] == trunk - 2 * 3 * (EXPERTS - TOP_K) * FF * HIDDEN
    assert (facts["moe_blocks"], facts["mtp_blocks"]) == ([1, 2], [3])
    text = "\n".join(describe_gguf(source, facts))
    assert "4, 2 of them with experts, 1 more for multi-token prediction" in text
    assert "12 a block, top-3" in text


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2"])
def test_inspect_foretells_the_size_of_the_export(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = write_model(tmp_path / "source.gguf", family)
    row = next(row for row in inspect_gguf(source)["pruned"] if row["prune"] == 0.25)
    assert row["num_experts"] == 9
    summary = export_gguf(source, plan=plan_for(family, keep=9), out=tmp_path / "out.gguf", dry_run=True)
    assert row["bytes"] == summary.sizes.bytes_after
