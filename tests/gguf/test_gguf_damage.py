"""Damaged GGUF files end in an error that says what is wrong, never in a hang, a crash or a wrong result."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from gguf import GGUFEndian, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeprune.errors import CheckpointError, MissingDependencyError, MoePruneError, UnsupportedModelError
from moeprune.gguf.file import open_gguf
from moeprune.gguf.header import read_header
from moeprune.gguf.model import read_model
from moeprune.gguf.types import ggml_types
from tests.gguf.files import FAMILIES, write_model

QWEN = FAMILIES["qwen3moe"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("gguf") / "whole.gguf", QWEN).read_bytes()


def written(folder: Path, data: bytes) -> Path:
    (folder / "model.gguf").write_bytes(data)
    return folder / "model.gguf"


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.005, 0.5, 0.9999])
def test_a_truncated_file(share: float, whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Download it again"):
        open_gguf(written(tmp_path, whole[: int(share * len(whole))]))


def test_a_file_cut_within_the_padding_at_its_end_is_complete(tmp_path: Path) -> None:
    source = write_model(tmp_path / "s.gguf", QWEN, edit=lambda builder: builder.add("odd.weight", (3,)))
    tensors = read_header(source).tensors
    assert tensors[-1].end < source.stat().st_size
    open_gguf(written(tmp_path, source.read_bytes()[: tensors[-1].end]))


def test_a_file_of_another_format(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a GGUF file: it begins with b'GGML'"):
        open_gguf(written(tmp_path, b"GGML" + whole[4:]))


@pytest.mark.parametrize("version", [0, 1, 4])
def test_another_version(version: int, whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"GGUF version {version}|big-endian"):
        open_gguf(written(tmp_path, whole[:4] + struct.pack("<I", version) + whole[8:]))


def test_a_big_endian_file(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "big.gguf", "qwen3moe", endianess=GGUFEndian.BIG)
    writer.add_expert_count(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"big-endian .* gguf-convert-endian big.gguf little"):
        open_gguf(tmp_path / "big.gguf")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("at", [8, 16])
def test_counts_that_the_file_cannot_hold_are_not_looped_over(at: int, whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are announced at byte"):
        open_gguf(written(tmp_path, whole[:at] + struct.pack("<Q", 1 << 62) + whole[at + 8 :]))


@pytest.mark.parametrize("key", [b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores", b"odd.nested"])
def test_an_array_longer_than_the_file(key: bytes, whole: bytes, tmp_path: Path) -> None:
    at = whole.index(key) + len(key) + 8
    with pytest.raises(CheckpointError, match="are announced at byte"):
        open_gguf(written(tmp_path, whole[:at] + struct.pack("<Q", 1 << 60) + whole[at + 8 :]))


def test_an_unknown_metadata_type(whole: bytes, tmp_path: Path) -> None:
    at = whole.index(b"odd.bool") + len(b"odd.bool")
    with pytest.raises(CheckpointError, match=r"metadata 'odd.bool' has the unknown type 77"):
        open_gguf(written(tmp_path, whole[:at] + struct.pack("<I", 77) + whole[at + 4 :]))


def test_metadata_given_twice(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the metadata key 'odd.i16' is there twice"):
        open_gguf(written(tmp_path, replaced(whole, b"odd.u16", b"odd.i16")))


def test_a_tensor_stored_twice(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_norm.weight' is stored twice"):
        open_gguf(written(tmp_path, replaced(whole, b"blk.2.attn_norm.weight", b"blk.0.attn_norm.weight")))


def with_info(whole: bytes, name: bytes, *, kind: int | None = None, offset: int | None = None) -> bytes:
    """The file with another type or offset for one tensor (two-dimensional)."""
    at = whole.index(name) + len(name) + 4 + 16
    old_kind, old_offset = struct.unpack_from("<IQ", whole, at)
    new = struct.pack("<IQ", old_kind if kind is None else kind, old_offset if offset is None else offset)
    return whole[:at] + new + whole[at + 12 :]


def test_a_tensor_beyond_the_end(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_gate_inp.weight' ends at byte \d+, the file at"):
        open_gguf(written(tmp_path, with_info(whole, b"blk.0.ffn_gate_inp.weight", offset=1 << 40)))


def test_overlapping_tensors(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensors 'token_embd.weight' and 'blk.0.ffn_gate_inp.weight' overlap"):
        open_gguf(written(tmp_path, with_info(whole, b"blk.0.ffn_gate_inp.weight", offset=32)))


def test_a_tensor_off_the_alignment(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a multiple of 32"):
        open_gguf(written(tmp_path, with_info(whole, b"blk.0.ffn_gate_inp.weight", offset=33)))


def test_a_tensor_type_of_a_newer_llama_cpp(whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ggml type 4000, .* pip install -U gguf"):
        open_gguf(written(tmp_path, with_info(whole, b"blk.0.ffn_gate_inp.weight", kind=4000)))


@pytest.mark.parametrize("alignment", [0, 24])
def test_an_alignment_that_is_no_power_of_two(alignment: int, tmp_path: Path) -> None:
    source = write_model(tmp_path / "s.gguf", QWEN, edit=lambda builder: builder.writer.add_custom_alignment(32))
    old = b"general.alignment" + struct.pack("<II", 4, 32)
    data = replaced(source.read_bytes(), old, b"general.alignment" + struct.pack("<II", 4, alignment))
    with pytest.raises(CheckpointError, match="expected a power of two"):
        open_gguf(written(tmp_path, data))


def split(folder: Path) -> list[Path]:
    write_model(folder / "part.gguf", QWEN, split_max_tensors=4)
    return sorted(folder.glob("part-*.gguf"))


def test_a_missing_part(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 4 parts are missing, first part-00002-of-00004\.gguf"):
        open_gguf(parts[0])


def test_a_renamed_part(tmp_path: Path) -> None:
    parts = split(tmp_path)
    with pytest.raises(CheckpointError, match="one of 4 parts, so its name must end in"):
        open_gguf(parts[0].rename(tmp_path / "model.gguf"))


def test_a_part_of_another_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_model(other / "part.gguf", QWEN, split_max_tensors=4, edit=lambda builder: builder.add("odd.weight", (3,)))
    (other / parts[-1].name).rename(parts[-1])
    with pytest.raises(CheckpointError, match=r"split.tensors.count is \d+, expected \d+: the parts are not"):
        open_gguf(parts[0])


def test_parts_in_the_wrong_order(tmp_path: Path) -> None:
    parts = split(tmp_path)
    swap = parts[1].rename(tmp_path / "swap")
    parts[2].rename(parts[1])
    swap.rename(parts[2])
    with pytest.raises(CheckpointError, match=r"split.no is 2, expected 1"):
        open_gguf(parts[0])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patches=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([b"\0", b"\xff", b"\1", b"\xff" * 8, b"\0" * 8, b"\x09\0\0\0"])),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_any_damage_to_the_header_is_an_error_or_harmless(
    patches: list[tuple[float, bytes]], whole: bytes, tmp_path: Path
) -> None:
    broken = bytearray(whole)
    end = whole.index(b"blk.2.attn_q_norm.weight") + 60
    for share, patch in patches:
        at = int(share * end)
        broken[at : at + len(patch)] = patch
    try:
        model = read_model(open_gguf(written(tmp_path, bytes(broken))))
    except MoePruneError:
        return
    assert all(0 < tensor.start <= tensor.end <= len(broken) for tensor in model.file.tensors.values())


def test_without_the_gguf_package_the_extra_is_named(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    ggml_types.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'moeprune\[gguf\]'"):
        open_gguf(written(tmp_path, whole))
