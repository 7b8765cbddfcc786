"""Byte arithmetic against numpy."""

from __future__ import annotations

import errno
import os
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.anatomy.stored import AllExperts, OneExpert
from moeprune.checkpoint.header import TensorInfo, encode_header, read_header
from moeprune.errors import ExportError, UnsupportedModelError
from moeprune.export import shards
from moeprune.export.shards import write_shards
from moeprune.export.slices import ByteRange, OutputTensor, plan_outputs

FILE = Path("x.safetensors")
WIDTHS = {"U8": np.uint8, "I16": np.int16, "F32": np.float32, "I64": np.int64}


def info(name: str, shape: tuple[int, ...], start: int = 0, *, dtype: str = "F32", file: Path = FILE) -> TensorInfo:
    return TensorInfo(name, dtype, shape, file, start, start + prod(shape) * np.dtype(WIDTHS[dtype]).itemsize)


@st.composite
def selections(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...], str, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    keep = tuple(sorted(draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))))
    return shape, dim, keep, draw(st.sampled_from(sorted(WIDTHS))), draw(st.integers(0, 100))


@given(selections())
def test_a_slice_is_what_numpy_takes_along_any_axis(selection):
    shape, dim, keep, dtype, start = selection
    array = np.arange(prod(shape)).astype(WIDTHS[dtype]).reshape(shape)
    data = b"#" * start + array.tobytes() + b"#" * 7
    tensor = OutputTensor("w", info("w", shape, start, dtype=dtype), (), keep, dim)
    expected = np.take(array, keep, axis=dim)
    assert b"".join(data[r.start : r.end] for r in tensor.ranges()) == expected.tobytes()
    assert tensor.num_bytes == expected.nbytes


@given(selections())
def test_slices_planned_for_a_fused_tensor_have_the_shape_that_numpy_gives(selection):
    shape, dim, keep, dtype, start = selection
    source = info("w", shape, start, dtype=dtype)
    (output,) = plan_outputs({"w": source}, roles={"w": AllExperts("layer", dim)}, keep={"layer": keep})[FILE]
    assert output.shape == np.take(np.zeros(shape), keep, axis=dim).shape
    assert sum(r.end - r.start for r in output.ranges()) == output.num_bytes


def test_neighbouring_experts_are_one_range():
    tensor = OutputTensor("w", info("w", (8, 3)), (5, 3), (0, 1, 4, 5, 6))
    assert list(tensor.ranges()) == [ByteRange(FILE, 0, 24), ByteRange(FILE, 48, 84)]


def test_a_tensor_without_experts_is_one_range():
    assert list(OutputTensor("w", info("w", (8, 3), 40), (8, 3)).ranges()) == [ByteRange(FILE, 40, 136)]


def test_single_experts_are_renumbered_by_layer_and_the_pruned_ones_left_out():
    keys = {f"{layer}.experts.{i}.w": (layer, i) for layer in ("a", "b") for i in range(3)}
    tensors = {key: info(key, (2,), 8 * n) for n, key in enumerate(keys)}
    roles = {key: OneExpert(layer, i, len(layer) + 9, len(layer) + 10) for key, (layer, i) in keys.items()}
    outputs = plan_outputs(tensors, roles=roles, keep={"a": (0, 2), "b": (1,)})[FILE]
    assert [(out.name, out.source.name) for out in outputs] == [
        ("a.experts.0.w", "a.experts.0.w"),
        ("a.experts.1.w", "a.experts.2.w"),
        ("b.experts.0.w", "b.experts.1.w"),
    ]


def test_an_expert_that_is_not_a_whole_number_of_bytes_is_refused():
    source = TensorInfo("w", "F4", (4, 3), FILE, 0, 6)
    with pytest.raises(UnsupportedModelError) as error:
        plan_outputs({"w": source}, roles={"w": AllExperts("layer", 0)}, keep={"layer": (0, 1)})
    assert str(error.value) == "x.safetensors: an expert of 'w' (F4) is not a whole number of bytes."


# Copying


def source_file(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.random((5, 7), dtype=np.float32), "b": rng.random((3, 6, 4), dtype=np.float32)}
    header = encode_header(((n, "F32", a.shape, a.nbytes) for n, a in arrays.items()), {"format": "pt"})
    path.write_bytes(header + b"".join(a.tobytes() for a in arrays.values()))
    return path, arrays


def write(source: Path, folder: Path) -> bytes:
    tensors, metadata = read_header(source)
    outputs = plan_outputs(
        tensors, roles={"a": AllExperts("l", 0), "b": AllExperts("l", 1)}, keep={"l": (0, 2, 3)}
    )  # fmt: skip
    folder.mkdir()
    done: list[int] = []
    write_shards(outputs, folder=folder, metadata={source.name: metadata}, progress=done.append)
    assert sum(done) == sum(out.num_bytes for out in outputs[source])
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("chunk", [5, 8 << 20])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_copying_in_the_kernel_and_through_a_buffer_give_the_same_file(tmp_path, monkeypatch, number, chunk):
    source, arrays = source_file(tmp_path / "s.safetensors")
    in_kernel = write(source, tmp_path / "kernel")
    expected = [np.take(arrays["a"], [0, 2, 3], 0), np.take(arrays["b"], [0, 2, 3], 1)]
    assert in_kernel.endswith(b"".join(array.tobytes() for array in expected))

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(shards, "CHUNK_BYTES", chunk)
    assert write(source, tmp_path / "buffer") == in_kernel


def test_a_kernel_that_copies_less_than_asked_is_asked_again(tmp_path, monkeypatch):
    source, _ = source_file(tmp_path / "s.safetensors")
    whole = write(source, tmp_path / "whole")
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda s, t, count, offset: real(s, t, min(count, 3), offset))
    assert write(source, tmp_path / "pieces") == whole


def test_a_kernel_that_gives_up_half_way_is_replaced_by_a_buffer(tmp_path, monkeypatch):
    source, _ = source_file(tmp_path / "s.safetensors")
    whole = write(source, tmp_path / "whole")
    real, calls = os.copy_file_range, []

    def sometimes(s, t, count, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.EXDEV, "cross-device link")
        return real(s, t, min(count, 11), offset)

    monkeypatch.setattr(os, "copy_file_range", sometimes)
    assert write(source, tmp_path / "mixed") == whole


def test_a_full_disk_is_not_mistaken_for_a_missing_kernel_call(tmp_path, monkeypatch):
    source, _ = source_file(tmp_path / "s.safetensors")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        write(source, tmp_path / "out")


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path, monkeypatch, in_kernel):
    source, _ = source_file(tmp_path / "s.safetensors")
    tensors, metadata = read_header(source)
    outputs = plan_outputs(tensors, roles={}, keep={})
    size = source.stat().st_size
    os.truncate(source, size - 10)
    if not in_kernel:
        monkeypatch.setattr(shards, "NO_KERNEL_COPY", {errno.EXDEV})
        monkeypatch.setattr(os, "copy_file_range", lambda *args: (_ for _ in ()).throw(OSError(errno.EXDEV, "x")))
    with pytest.raises(ExportError) as error:
        write_shards(outputs, folder=tmp_path, metadata={source.name: metadata}, progress=lambda n: None)
    assert str(error.value) == (
        f"{source}: ends at byte {size - 10}, expected {size}. Did another program write to it?"
    )
