"""Files that are not, or no longer, statistics: each is refused with what is wrong with it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeprune.calibrate.stats import Stats
from moeprune.errors import StatsError
from tests.fake_stats import facts


def stats_error(path: Path) -> str:
    with pytest.raises(StatsError) as error:
        Stats.load(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("content", [None, b"", bytes(range(256)), b'{"format": 1}', struct.pack("<Q", 2 << 30)])
def test_statistics_that_are_none(tmp_path, content):
    path = tmp_path / "stats.safetensors"
    path.mkdir() if content is None else path.write_bytes(content)
    stats_error(path)


def test_a_checkpoint_in_place_of_statistics_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3).bfloat16()}, path)
    assert stats_error(path) == f"{path}: a safetensors file, but not statistics of moeprune."


HEADER_EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda header: header.pop("format"), "damaged header ('format')"),
    (lambda header: header.pop("model"), "damaged header ('model')"),
    (lambda header: header.pop("runs"), "damaged header ('runs')"),
    (lambda header: header.update(domains=3), "damaged header (expected a list of names, got 3)"),
    (lambda header: header.update(domains="ab"), "damaged header (expected a list of names, got 'ab')"),
    (lambda header: header.update(domains=["a", "a"]), "two domains of the same name"),
    (lambda header: header.update(runs=["a run"]), "damaged header"),
    (lambda header: header.update(domains=["a", "b", "c"]), "tokens has shape [2], expected [3]"),
    (lambda header: header.update(format="x"), "damaged header (invalid literal"),
    (lambda header: header.update(format=None), "damaged header (int() argument"),
    (lambda header: header.update(format=999), "this version of moeprune reads"),
    (lambda header: header["model"].update(topk=2), "topk"),
    (lambda header: header["model"].update(num_experts=99), "has shape [2, 2, 10], expected [2, 2, 99]"),
    (lambda header: header["model"].update(layers=["one"]), "has shape [2, 2, 10], expected [2, 1, 10]"),
]


@pytest.mark.parametrize(("edit", "message"), HEADER_EDITS)
def test_statistics_whose_header_was_edited(tmp_path, edit, message):
    path = tmp_path / "stats.safetensors"
    Stats.zeros(facts(), domains=["a", "b"]).save(path)
    Stats.load(path)

    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["moeprune"])
    edit(header)
    save_file(arrays, path, metadata={"moeprune": json.dumps(header)})
    assert message in stats_error(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "format": 2}', "[" * 9999])
def test_statistics_whose_header_is_no_object(tmp_path, text):
    path = tmp_path / "stats.safetensors"
    save_file({"tokens": torch.zeros(2)}, path, metadata={"moeprune": text})
    assert "statistics with a damaged header" in stats_error(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_arrays_of_another_dtype_would_lose_digits_when_files_are_merged(tmp_path, dtype):
    path = tmp_path / "stats.safetensors"
    rewritten(path, lambda arrays: arrays.update({"experts.count": arrays["experts.count"].to(dtype)}))
    assert f"count is {str(dtype).removeprefix('torch.')}, expected float64" in stats_error(path)


def test_a_number_of_tokens_that_is_none(tmp_path):
    path = tmp_path / "stats.safetensors"
    rewritten(path, lambda arrays: arrays["tokens"].fill_(torch.nan))
    assert stats_error(path) == f"{path}: the number of tokens by domain is [nan, nan]. Calibrate again."


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    Stats.zeros(facts(), domains=["a", "b"]).save(path)
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    change(arrays)
    save_file(arrays, path, metadata=metadata)
