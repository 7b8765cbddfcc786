"""Which tensor goes into which file."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from moeprune.checkpoint.header import TensorInfo, read_header
from moeprune.errors import ExportError
from moeprune.export import shards as shards_module
from moeprune.export.journal import Journal
from moeprune.export.layout import BLOCK_BYTES, Shard, lay_out, parse_size
from moeprune.export.shards import write_index, write_shards
from moeprune.export.slices import OutputTensor

FILES = (Path("a.safetensors"), Path("b.safetensors"), Path("c.safetensors"))


def outputs_of(*files: list[int]) -> dict[Path, list[OutputTensor]]:
    """Whole tensors of the given numbers of bytes, by source file."""
    outputs, number = {}, 0
    for path, sizes in zip(FILES, files, strict=False):
        start, outputs[path] = 104, []
        for size in sizes:
            info = TensorInfo(f"t{number}", "U8", (size,), path, start, start + size)
            outputs[path].append(OutputTensor(info.name, info, info.shape))
            start, number = start + size, number + 1
    return outputs


def laid_out(outputs: dict[Path, list[OutputTensor]], max_bytes: int | None, **more: int) -> tuple[Shard, ...]:
    """``more``: tensors that a source file holds beside those that are written."""
    held = Counter({path: len(tensors) + more.get(path.stem, 0) for path, tensors in outputs.items()})
    metadata = {path.name: {"format": "pt", "from": path.stem, path.stem: "x"} for path in outputs}
    return lay_out(outputs, metadata=metadata, tensors_in=held, max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("10kb", 10**4), (77, 77)],
)
def test_sizes_are_spelt_as_transformers_spells_them(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-5GB", "0", "0.0001kb", "1e9", "5GBs", "5G B"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ExportError) as error:
        parse_size(text)
    assert str(error.value) == f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB."


def test_without_a_limit_the_boundaries_of_the_source_stay():
    shards = laid_out(outputs_of([5, 6], [7]), None, a=1, b=1)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [["t0", "t1"], ["t2"]]
    assert [shard.name for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_limit_splits_and_joins_files_at_tensors():
    shards = laid_out(outputs_of([50, 60], [30, 10, 200], [1]), 100)
    assert [[tensor.num_bytes for tensor in shard.tensors] for shard in shards] == [[50], [60, 30, 10], [200], [1]]
    assert shards[1].files == (FILES[0], FILES[1])


@given(st.lists(st.lists(st.integers(1, 50), min_size=1), min_size=1, max_size=3), st.integers(1, 120))
def test_every_tensor_is_in_one_file_in_order_and_no_two_files_would_fit_in_one(sizes, limit):
    outputs = outputs_of(*sizes)
    shards = laid_out(outputs, limit)
    flat = [tensor for tensors in outputs.values() for tensor in tensors]
    assert [tensor for shard in shards for tensor in shard.tensors] == flat
    assert all(shard.data_bytes <= limit or len(shard.tensors) == 1 for shard in shards)
    for left, right in pairwise(shards):
        assert left.data_bytes + right.tensors[0].num_bytes > limit
    assert len({shard.name for shard in shards}) == len(shards)


def test_one_file_has_the_name_that_readers_look_for():
    (shard,) = laid_out(outputs_of([5, 6], [7]), 100)
    assert shard.name == "model.safetensors"


def test_a_file_of_several_carries_the_metadata_of_all():
    (shard,) = laid_out(outputs_of([5], [7]), 100)
    metadata = json.loads(shard.header[8:])["__metadata__"]
    assert metadata == {"format": "pt", "from": "a", "a": "x", "b": "x"}


def test_a_file_of_which_all_stays_is_untouched():
    first, second = laid_out(outputs_of([5, 6], [7]), None, b=1)
    assert (first.untouched, first.header, first.num_bytes) == (FILES[0], b"", 104 + 11)
    assert second.untouched is None


def test_a_renamed_or_computed_tensor_does_not_go_for_untouched():
    outputs = outputs_of([5], [7])
    (first,), (second,) = outputs.values()
    outputs[FILES[0]] = [OutputTensor("new", first.source, first.shape)]
    outputs[FILES[1]] = [OutputTensor("t1", second.source, second.shape, compute=bytes)]
    assert [shard.untouched for shard in laid_out(outputs, None)] == [None, None]


def test_the_header_brings_the_data_to_where_blocks_begin_in_the_source():
    info = TensorInfo("w", "U8", (20 * BLOCK_BYTES,), FILES[0], 5 * BLOCK_BYTES + 256, 25 * BLOCK_BYTES + 256)
    small = TensorInfo("s", "U8", (24,), FILES[0], 5 * BLOCK_BYTES + 200, 5 * BLOCK_BYTES + 224)
    tensors = [OutputTensor(i.name, i, i.shape) for i in (small, info)]
    (shard,) = lay_out({FILES[0]: tensors}, metadata={FILES[0].name: {}}, tensors_in={FILES[0]: 3})
    assert (len(shard.header) + 24) % BLOCK_BYTES == 256
    assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
    assert len(shard.header) < 2 * BLOCK_BYTES


def test_a_header_is_not_padded_where_nothing_can_be_shared():
    (shard,) = laid_out(outputs_of([50]), None, a=1)
    assert len(shard.header) == len(shard.header.rstrip()) + -len(shard.header.rstrip()) % 8


def test_the_data_begins_at_a_multiple_of_8_even_if_the_source_does_not():
    info = TensorInfo("w", "U8", (20 * BLOCK_BYTES,), FILES[0], 113, 20 * BLOCK_BYTES + 113)
    tensors = [OutputTensor("v", info, info.shape)]
    (shard,) = lay_out({FILES[0]: tensors}, metadata={FILES[0].name: {}}, tensors_in={FILES[0]: 1})
    assert len(shard.header) % 8 == 0


# Written and read again by the safetensors library


@pytest.mark.parametrize("limit", [1, 300, 1000, 10**6])
@pytest.mark.parametrize("jobs", [1, 3])
def test_files_of_any_size_hold_the_same_tensors_and_the_index_finds_them(tmp_path, limit, jobs):
    rng = np.random.default_rng(0)
    arrays = {f"w{n}": rng.random((n + 1, 7), dtype=np.float32) for n in range(12)}
    tensors, metadata = {}, {}
    for number in range(3):
        file = tmp_path / f"s{number}.safetensors"
        save_file({k: a for n, (k, a) in enumerate(arrays.items()) if n % 3 == number}, file, {"format": "pt"})
        found, metadata[file.name] = read_header(file)
        tensors |= found
    outputs: dict[Path, list[OutputTensor]] = {}
    for info in tensors.values():
        outputs.setdefault(info.file, []).append(OutputTensor(info.name, info, info.shape))
    shards = lay_out(outputs, metadata=metadata, tensors_in=Counter(t.file for t in tensors.values()), max_bytes=limit)
    out = tmp_path / "out"
    out.mkdir()
    write_shards(shards, folder=out, journal=Journal(out, job="x"), jobs=jobs)
    write_index(shards, folder=out, metadata={"total_size": 1, "made_by": "us"})
    if len(shards) == 1:
        assert not (out / "model.safetensors.index.json").exists()
        where = dict.fromkeys(arrays, "model.safetensors")
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values()), "made_by": "us"}
        where = index["weight_map"]
    assert where.keys() == arrays.keys()
    for name, array in arrays.items():
        with safe_open(out / where[name], "np") as file:
            np.testing.assert_array_equal(file.get_tensor(name), array)
            assert file.metadata() == {"format": "pt"}
    held = sorted(name for path in out.glob("*.safetensors") for name in read_header(path)[0])
    assert held == sorted(arrays)


def test_the_error_of_one_file_is_not_hidden_by_the_others_that_it_stops(tmp_path, monkeypatch):
    outputs = outputs_of([5], [7])
    stopped = threading.Event()

    class Turns(shards_module._Turns):
        def stop(self) -> None:
            super().stop()
            stopped.wait(5)  # the other file ends before the failed one is reported

    def finish(work, shard: Shard) -> None:
        if shard.name.startswith("model-00001"):
            raise ExportError("what went wrong")
        try:
            while True:
                work.progress(0)
        finally:
            stopped.set()

    monkeypatch.setattr(shards_module, "_Turns", Turns)
    monkeypatch.setattr(shards_module._Work, "_finish", finish)
    with pytest.raises(ExportError, match="what went wrong"):
        write_shards(laid_out(outputs, None, a=1, b=1), folder=tmp_path, journal=Journal(tmp_path, job="x"), jobs=2)
