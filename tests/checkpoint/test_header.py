"""Reading and writing safetensors headers, against the safetensors library."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeprune.checkpoint.header import DTYPE_BITS, encode_header, read_header
from moeprune.errors import CheckpointError

WHOLE_BYTES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    return str(error.value)


def test_shapes_dtypes_and_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "z.float": torch.randn(3, 5),
        "a.bf16": torch.randn(7, 2, 3).bfloat16(),
        "half": torch.randn(5).half(),
        "fp8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False, True]),
        "Zürich": torch.zeros(1, dtype=torch.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt", "note": "ü"}
    assert found.keys() == tensors.keys()
    stored = dict(safetensors.deserialize(path.read_bytes()))
    data = path.read_bytes()
    for name, info in found.items():
        assert (list(info.shape), info.dtype) == (stored[name]["shape"], stored[name]["dtype"])
        assert data[info.start : info.end] == bytes(stored[name]["data"])
        assert info.numel == tensors[name].numel()
        assert info.num_bytes == tensors[name].nbytes
        assert (info.name, info.file) == (name, path)
    starts = [info.start for info in found.values()]
    assert starts == sorted(starts), "tensors must come in the order of their bytes"


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...], int]]:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=6))
    layout = []
    for name in names:
        if name != "__metadata__":
            dtype = draw(st.sampled_from(WHOLE_BYTES))
            shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
            layout.append((name, dtype, shape, prod(shape) * DTYPE_BITS[dtype] // 8))
    return layout


@given(layout=layouts(), metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("v")))
def test_an_encoded_header_reads_back_and_the_library_accepts_it(tmp_path_factory, layout, metadata):
    encoded = encode_header(layout, metadata)
    assert len(encoded) % 8 == 0
    size = sum(num_bytes for *_, num_bytes in layout)
    data = bytes(i % 251 for i in range(size))
    path = tmp_path_factory.getbasetemp() / "encoded.safetensors"
    path.write_bytes(encoded + data)
    found, read_metadata = read_header(path)
    assert [(info.name, info.dtype, info.shape, info.num_bytes) for info in found.values()] == layout
    assert read_metadata == metadata
    starts = [info.start for info in found.values()]
    assert starts == [len(encoded) + sum(n for *_, n in layout[:i]) for i in range(len(layout))]
    stored = dict(safetensors.deserialize(encoded + data))
    assert {name: (e["dtype"], tuple(e["shape"])) for name, e in stored.items()} == {n: (d, s) for n, d, s, _ in layout}


def test_metadata_is_left_out_where_empty():
    assert encode_header([], {})[8:].strip() == b"{}"


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_dtypes_below_a_byte_are_counted_in_bits(tmp_path, dtype):
    num_bytes = 8 * DTYPE_BITS[dtype] // 8
    path = write_raw(tmp_path / "x", {"w": entry([8], 0, num_bytes, dtype)}, bytes(num_bytes))
    assert read_header(path)[0]["w"].num_bytes == num_bytes


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 0), struct.pack("<Q", 1) + b"{"])
def test_a_file_too_short_for_a_header(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    assert error_of(path) == (
        f"{path}: not a complete safetensors file ({len(content)} bytes, header length {length}). Download it again."
    )


def test_a_download_that_stopped_inside_the_header(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    path.write_bytes(path.read_bytes()[:20])
    assert error_of(path) == (
        f"{path}: not a complete safetensors file (20 bytes, header length {length}). Download it again."
    )


def test_a_git_lfs_pointer_is_not_read_as_a_huge_header(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976\n")
    assert error_of(path) == (
        f"{path}: not safetensors but a Git LFS pointer to the weights. Run `git lfs pull` in its folder."
    )


def test_a_download_that_stopped_inside_the_data(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert error_of(path) == f"{path}: tensor 'w' ends at byte {size}, the file at {size - 1}. Download it again."


def test_a_header_that_is_not_json(tmp_path):
    path = write_raw(tmp_path / "x", b"hello wo")
    assert error_of(path) == f"{path}: the safetensors header is not JSON (Expecting value: line 1 column 1 (char 0))."


@pytest.mark.parametrize("header", [[1, 2], "text", 12345])
def test_a_header_that_is_json_but_not_an_object(tmp_path, header):
    path = write_raw(tmp_path / "x", header)
    assert error_of(path) == f"{path}: the safetensors header is not a JSON object but {type(header).__name__}."


def test_tensors_that_overlap(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))
    assert error_of(path) == f"{path}: tensors 'a' and 'b' overlap."


def test_a_tensor_whose_bytes_do_not_fit_its_shape(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry([3], 0, 8)}, bytes(8))
    assert error_of(path) == f"{path}: tensor 'a', F32 [3], does not fit into bytes 0 to 8."


def test_a_tensor_with_negative_sizes(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry([-1, -2], 0, 8)}, bytes(8))
    shown = "{'data_offsets': [0, 8], 'dtype': 'F32', 'shape': [-1, -2]}"
    assert error_of(path) == f"{path}: the header entry of 'a' is malformed: {shown}."


def test_a_tensor_that_starts_inside_the_header(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry([2], -8, 0)}, bytes(8))
    shown = "{'data_offsets': [-8, 0], 'dtype': 'F32', 'shape': [2]}"
    assert error_of(path) == f"{path}: the header entry of 'a' is malformed: {shown}."


def test_an_unknown_dtype(tmp_path):
    path = write_raw(tmp_path / "x", {"a": entry([2], 0, 8, "F31")}, bytes(8))
    assert error_of(path) == f"{path}: tensor 'a' has the unknown dtype 'F31'. Known: {sorted(DTYPE_BITS)}."


@pytest.mark.parametrize("bad", [{"dtype": "F32", "shape": [2]}, {"data_offsets": [0, 8], "shape": [2]}, [1], None])
def test_a_malformed_entry(tmp_path, bad):
    path = write_raw(tmp_path / "x", {"a": bad}, bytes(8))
    assert error_of(path) == f"{path}: the header entry of 'a' is malformed: {bad!r}."
