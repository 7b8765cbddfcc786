"""Pruned GGUF files, read back and dequantised by the gguf package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from moeprune import __version__
from moeprune.errors import ExportError
from moeprune.files import locked
from moeprune.gguf.export import export_gguf
from moeprune.gguf.file import open_gguf
from moeprune.gguf.write import BUFFER_BYTES
from moeprune.plan.plan import Plan
from tests.gguf.files import (
    BLOCKS,
    EXPERTS,
    FAMILIES,
    FF,
    HIDDEN,
    TOP_K,
    Builder,
    Family,
    dequantised,
    entries,
    keep_of,
    plan_for,
    qwen3moe,
    write_model,
)

QWEN = FAMILIES["qwen3moe"]
WITHOUT_DEQUANTISATION = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0")  # in gguf 0.19
EXPERT_NAME = re.compile(r"_exps|ffn_gate_inp\.(weight|bias)|exp_probs_b")


def expected_tensors(source: dict[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """What must be left, from dequantised tensors: numpy takes the kept experts along the axis of their number."""
    keep = {int(layer.layer.rpartition(".")[2]): list(layer.keep) for layer in plan.layers}
    left = {}
    for name, values in source.items():
        block = int(name.split(".")[1]) if name.startswith("blk.") else -1
        ids = keep.get(block, keep[max(keep)])  # the last for multi-token prediction
        alone = re.fullmatch(r"(blk\.\d+\.ffn_\w+\.)(\d+)(\.weight)", name)
        if alone:
            if int(alone[2]) in ids:
                left[f"{alone[1]}{ids.index(int(alone[2]))}{alone[3]}"] = values
        else:
            experts = EXPERT_NAME.search(name) is not None
            left[name] = np.take(values, ids, axis=values.shape.index(EXPERTS)) if experts else values
    return left


@pytest.mark.parametrize("name", FAMILIES)
def test_dequantised_tensors_are_the_kept_experts_of_the_source(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = write_model(tmp_path / "source.gguf", family)
    plan = plan_for(family, keep=keep_of(family))
    export_gguf(source, plan=plan, out=tmp_path / "out.gguf", quiet=True)
    before, after = GGUFReader(source), GGUFReader(tmp_path / "out.gguf")
    expected, found = expected_tensors(dequantised(before), plan), dequantised(after)
    assert list(found) == list(expected), "names and their order"
    for key, values in expected.items():
        assert np.isfinite(values).all(), key
        assert np.array_equal(found[key], values), key
    kinds = {tensor.name: tensor.tensor_type for tensor in before.tensors}
    assert all(tensor.tensor_type == kinds[tensor.name] for tensor in after.tensors if tensor.name in kinds)


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_quantisation_is_sliced_without_being_touched(kind: T, tmp_path: Path) -> None:
    family = Family("qwen3moe", "qwen3_moe", qwen3moe, kinds=(kind, kind, kind))
    source = write_model(tmp_path / "source.gguf", family)
    plan = plan_for(family)
    export_gguf(source, plan=plan, out=tmp_path / "out.gguf", quiet=True)
    before = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    after = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    for layer in plan.layers:
        name = f"blk.{layer.layer.rpartition('.')[2]}.ffn_down_exps.weight"
        assert after[name].tensor_type == kind
        kept = np.take(before[name], layer.keep, axis=0)
        assert np.array_equal(after[name].data.view(np.uint8), kept.view(np.uint8))
        if kind.name not in WITHOUT_DEQUANTISATION:
            assert np.array_equal(gguf.dequantize(after[name].data, kind), gguf.dequantize(kept, kind))


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata_is_the_source_s_but_for_the_counts(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = write_model(tmp_path / "source.gguf", family)
    plan = plan_for(family, keep=keep_of(family))
    export_gguf(source, plan=plan, out=tmp_path / "out.gguf", quiet=True)
    before, after = entries(GGUFReader(source)), entries(GGUFReader(tmp_path / "out.gguf"))
    count, used = f"{family.architecture}.expert_count", f"{family.architecture}.expert_used_count"
    assert before[count] == ([gguf.GGUFValueType.UINT32], EXPERTS)
    assert after[count] == ([gguf.GGUFValueType.UINT32], plan.num_experts)
    assert after[used] == ([gguf.GGUFValueType.UINT32], plan.top_k)
    ours = {key: value for key, value in after.items() if key.startswith("moeprune.")}
    assert {key: value for key, value in after.items() if key not in ours} == before | {
        count: after[count],
        used: after[used],
    }
    assert ours["moeprune.version"][1] == __version__
    assert Plan.model_validate_json(ours["moeprune.plan"][1]) == plan
    assert ours["moeprune.plan_sha256"][1] == plan.sha256


def test_metadata_the_gguf_reader_flattens_is_copied_as_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    nested = b"odd.nested" + bytes.fromhex("09000000090000000200000000000000")
    at_source, at_result = source.read_bytes().index(nested), (tmp_path / "out.gguf").read_bytes().index(nested)
    assert source.read_bytes()[at_source:][:90] == (tmp_path / "out.gguf").read_bytes()[at_result:][:90]


def test_a_top_k_for_each_block_stays_one_with_zeros_for_dense_blocks(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN, used=[TOP_K, 0, TOP_K])
    export_gguf(source, plan=plan_for(QWEN, top_k=2), out=tmp_path / "out.gguf", quiet=True)
    before, after = (
        entries(GGUFReader(path))["qwen3moe.expert_used_count"] for path in (source, tmp_path / "out.gguf")
    )
    assert after[0] == before[0]
    assert after[1] == [2, 0, 2]


def test_fewer_active_experts_alone_copy_every_tensor(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    summary = export_gguf(source, plan=plan_for(QWEN, keep=EXPERTS, top_k=1), out=tmp_path / "out.gguf", quiet=True)
    assert (summary.tensors_sliced, summary.tensors_dropped) == (0, 0)
    before, after = dequantised(GGUFReader(source)), dequantised(GGUFReader(tmp_path / "out.gguf"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert entries(GGUFReader(tmp_path / "out.gguf"))["qwen3moe.expert_used_count"][1] == 1


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensors_start_where_the_alignment_of_the_file_says(alignment: int, tmp_path: Path) -> None:
    def align(builder: Builder) -> None:
        builder.writer.add_custom_alignment(alignment)
        builder.add("odd.weight", (3,))

    source = write_model(tmp_path / "source.gguf", QWEN, edit=align)
    export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == alignment
    assert all(tensor.data_offset % alignment == 0 for tensor in reader.tensors)
    # ggml accepts no gap but the padding (gguf_init_from_file: "has offset ..., expected ...").
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        end += -(-tensor.n_bytes // alignment) * alignment
    assert end == (tmp_path / "out.gguf").stat().st_size


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf", QWEN)
    write_model(tmp_path / "part.gguf", QWEN, split_max_tensors=4)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 4
    plan = plan_for(QWEN)
    export_gguf(whole, plan=plan, out=tmp_path / "a.gguf", quiet=True)
    for number, part in enumerate(parts):
        export_gguf(part, plan=plan, out=tmp_path / f"{number}.gguf", quiet=True)
        assert (tmp_path / f"{number}.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_pruning_twice_keeps_both_plans(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    first = plan_for(QWEN)
    export_gguf(source, plan=first, out=tmp_path / "once.gguf", quiet=True)
    facts = first.model.model_copy(update={"num_experts": first.num_experts, "top_k": first.top_k})
    layers = tuple(layer.model_copy(update={"keep": (0, 3, 6)}) for layer in first.layers)
    second = first.model_copy(update={"model": facts, "layers": layers, "num_experts": 3})
    export_gguf(tmp_path / "once.gguf", plan=second, out=tmp_path / "twice.gguf", quiet=True)
    found = entries(GGUFReader(tmp_path / "twice.gguf"))
    assert Plan.model_validate_json(found["moeprune.plan"][1]) == second
    assert Plan.model_validate_json(found["moeprune.earlier.plan"][1]) == first
    original = dequantised(GGUFReader(source))["blk.2.ffn_up_exps.weight"]
    ids = [first.layers[-1].keep[i] for i in (0, 3, 6)]
    assert np.array_equal(dequantised(GGUFReader(tmp_path / "twice.gguf"))["blk.2.ffn_up_exps.weight"], original[ids])


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    summary = export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    before, after = GGUFReader(source).tensors, GGUFReader(tmp_path / "out.gguf").tensors
    assert summary.sizes.bytes_before == sum(tensor.n_bytes for tensor in before)
    assert summary.sizes.bytes_after == sum(tensor.n_bytes for tensor in after)
    assert summary.sizes.parameters_after == sum(tensor.n_elements for tensor in after)
    expert = 2 * 3 * HIDDEN * FF  # in both blocks
    assert summary.sizes.active_before == summary.sizes.parameters_before - (EXPERTS - TOP_K) * expert
    assert summary.sizes.active_after == summary.sizes.parameters_after - (7 - 2) * expert
    assert (summary.tensors_sliced, summary.tensors_kept) == (2 * 4, len(before) - 8)


def test_blocks_for_multi_token_prediction_are_pruned_and_named(tmp_path: Path) -> None:
    family = FAMILIES["glm4moe with multi-token prediction"]
    source = write_model(tmp_path / "source.gguf", family)
    summary = export_gguf(source, plan=plan_for(family), out=tmp_path / "out.gguf", quiet=True)
    assert f"[{BLOCKS}] (multi-token prediction)" in summary.warnings[0]
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert tensors[f"blk.{BLOCKS}.ffn_up_exps.weight"].shape.tolist() == [HIDDEN, FF, 7]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    summary = export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", dry_run=True)
    assert summary.sizes.bytes_after < summary.sizes.bytes_before
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    out, plan = tmp_path / "out.gguf", plan_for(QWEN)
    out.write_bytes(b"mine")
    with pytest.raises(ExportError, match="--force"):
        export_gguf(source, plan=plan, out=out, quiet=True)
    assert out.read_bytes() == b"mine"
    export_gguf(source, plan=plan, out=out, force=True, quiet=True)
    assert open_gguf(out).count("qwen3moe.expert_count") == 7


@pytest.mark.parametrize("name", ["source.gguf", "./source.gguf"])
def test_the_source_is_not_overwritten_even_with_force(name: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    with pytest.raises(ExportError, match="is the source"):
        export_gguf(source, plan=plan_for(QWEN), out=tmp_path / name, force=True, quiet=True)


def test_a_folder_as_target_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    with pytest.raises(ExportError, match=r"ends in \.gguf"):
        export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out", quiet=True)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ExportError, match="only 1000 B are free"):
        export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    assert list(tmp_path.iterdir()) == [source]


def test_what_a_killed_export_left_is_overwritten_and_not_asked_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    left = tmp_path / "out.gguf.partial"
    left.write_bytes(bytes(1 << 23))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    assert (tmp_path / "out.gguf").stat().st_size < 1 << 23
    assert not left.exists()


def test_two_exports_do_not_write_the_same_file(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    other = tmp_path / "out.gguf.partial"
    other.write_bytes(b"half")
    with locked(other), pytest.raises(ExportError, match="another export writes there"):
        export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    assert other.read_bytes() == b"half"


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    with pytest.raises(ExportError, match=r"source\.gguf: (Not a directory|File exists)\.$"):
        export_gguf(source, plan=plan_for(QWEN), out=source / "out.gguf", quiet=True)


def test_experts_larger_than_the_buffer_are_whole(tmp_path: Path) -> None:
    name = "blk.0.ffn_big_exps.weight"
    source = write_model(tmp_path / "source.gguf", QWEN, edit=lambda b: b.add(name, (EXPERTS, 3072, HIDDEN)))
    plan = plan_for(QWEN)
    export_gguf(source, plan=plan, out=tmp_path / "out.gguf", quiet=True)
    assert 3072 * HIDDEN * 4 > 5 * BUFFER_BYTES
    before, after = dequantised(GGUFReader(source)), dequantised(GGUFReader(tmp_path / "out.gguf"))
    assert np.array_equal(after[name], before[name][list(plan.layers[0].keep)])


def test_a_source_cut_while_it_is_read_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source.gguf", QWEN)
    whole = source.read_bytes()

    def cut(*_: object, **__: object) -> list[object]:
        source.write_bytes(whole[: len(whole) // 2])
        return []

    monkeypatch.setattr("moeprune.gguf.export.pruned_metadata", cut)
    with pytest.raises(ExportError, match="Did another program write to it"):
        export_gguf(source, plan=plan_for(QWEN), out=tmp_path / "out.gguf", quiet=True)
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_about_gguf_imports_torch() -> None:
    modules = "moeprune.gguf.export, moeprune.gguf.inspect, moeprune.gguf.verify"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_groups_that_the_plan_switches_off_become_one(tmp_path: Path) -> None:
    family = FAMILIES["deepseek2"]
    source = write_model(tmp_path / "source.gguf", family)
    plan = plan_for(family, keep=9)
    layers = tuple(layer.model_copy(update={"keep": tuple(range(1, 8))}) for layer in plan.layers)
    plan = plan.model_copy(update={"n_group": 1, "num_experts": 7, "layers": layers})
    export_gguf(source, plan=plan, out=tmp_path / "out.gguf", quiet=True)
    found = entries(GGUFReader(tmp_path / "out.gguf"))
    # llama.cpp wants fewer groups used than there are only where there are several (llama_model::load_hparams).
    assert found["deepseek2.expert_group_count"][1] == 1
    assert found["deepseek2.expert_group_used_count"][1] == 1
    assert found["deepseek2.expert_count"][1] == 7
