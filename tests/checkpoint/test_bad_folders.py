"""Folders that are not, or not quite, a checkpoint: what is wrong is named, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeprune.checkpoint.folder import open_checkpoint, read_config
from moeprune.checkpoint.load import load_model
from moeprune.errors import CheckpointError
from moeprune.files import write_json
from tests.models import save

INDEX = "model.safetensors.index.json"
NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def folder_of(path: Path, *, weight_map: Any = None, more: dict[str, Any] | None = None) -> Path:
    """A checkpoint of two shards with a tensor each, and the index given."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for number, name in enumerate(NAMES):
        save_file({f"w{number}": torch.full((3,), float(number))}, path / name)
    right = {"w0": NAMES[0], "w1": NAMES[1]}
    index = {"metadata": {"total_size": 24}, "weight_map": right if weight_map is None else weight_map} | (more or {})
    (path / INDEX).write_text(json.dumps(index))
    return path


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    return str(error.value)


# The index


def test_the_folder_that_these_tests_damage_opens(tmp_path):
    assert list(open_checkpoint(folder_of(tmp_path)).tensors) == ["w0", "w1"]


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors", "/etc/secret.safetensors", "..", ".", "", "a/b.safetensors", "a\\b.safetensors",
        "./model-00001-of-00002.safetensors", "C:\\x.safetensors", "x.safetensors\0.safetensors", "x.safetensors\n",
        "pytorch_model-00001-of-00002.bin", "config.json", None, 3, ["a"], {"a": 1}, True,
    ],
)  # fmt: skip
def test_an_index_names_safetensors_files_of_its_own_folder_only(tmp_path, file):
    save_file({"w1": torch.zeros(3)}, tmp_path / "secret.safetensors")
    folder = folder_of(tmp_path / "m", weight_map={"w0": NAMES[0], "w1": file})
    assert refusal(folder) == (
        f"{folder / INDEX}: puts 'w1' in {file!r}; expected the name of a .safetensors file in the same folder."
    )


@pytest.mark.parametrize("weight_map", [{}, [], ["w0"], "w0", 1, False])
def test_an_index_without_a_weight_map(tmp_path, weight_map):
    folder = folder_of(tmp_path, weight_map=weight_map)
    expected = f"{folder / INDEX}: not a safetensors index with a weight_map. Download it again."
    assert refusal(folder) == expected
    (folder / INDEX).write_text("{}")
    assert refusal(folder) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0))."),
        (b"{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))."),
        (b"[]", "expected a JSON object, got list."),
        (b"null", "expected a JSON object, got NoneType."),
        (b"\xff\xfe", "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)."),
        (b"[" * 100_000, "not JSON (nested too deeply)."),
        (b'{"weight_map":{},"weight_map":{}}', "not JSON (the key 'weight_map' is given more than once)."),
        (b'{"weight_map":{"w":"a","w":"b"}}', "not JSON (the key 'w' is given more than once)."),
        (b"version https://git-lfs.github.com/spec/v1", "not JSON (Expecting value: line 1 column 1 (char 0))."),
    ],
)
def test_a_damaged_index(tmp_path, content, message):
    folder = folder_of(tmp_path)
    (folder / INDEX).write_bytes(content)
    assert refusal(folder) == f"{folder / INDEX}: {message}"


@pytest.mark.parametrize("how", ["absent", "a folder", "a dangling link", "a name that is too long"])
def test_a_shard_that_is_no_file(tmp_path, how):
    name = "x" * 300 + ".safetensors" if how == "a name that is too long" else "other.safetensors"
    folder = folder_of(tmp_path, weight_map={"w0": NAMES[0], "w1": name})
    if how == "a folder":
        (folder / name).mkdir()
    if how == "a dangling link":
        (folder / name).symlink_to(tmp_path / "nowhere")
    assert refusal(folder) == (
        f"{folder}: 1 of 2 shards of {INDEX} are missing, first {name}. Download the checkpoint again."
    )


def test_an_index_with_a_tensor_that_no_shard_holds(tmp_path):
    folder = folder_of(tmp_path, weight_map={"w0": NAMES[0], "w1": NAMES[1], "w2": NAMES[1]})
    assert refusal(folder) == f"{folder}: {INDEX} puts 'w2' in {NAMES[1]}, where it is not. Download it again."


def test_a_tensor_that_the_index_forgot_is_read_as_transformers_reads_it(tmp_path):
    """transformers takes from the index only which files to read."""
    folder = save("mixtral", tmp_path / "m", shard="30KB")
    before = load_model(folder)
    index = json.loads((folder / INDEX).read_text())
    key = "model.layers.1.block_sparse_moe.gate.weight"
    home = index["weight_map"].pop(key)
    assert home in index["weight_map"].values()
    (folder / INDEX).write_text(json.dumps(index))
    assert open_checkpoint(folder).tensors[key].file.name == home
    after = load_model(folder)  # strict: it would say which tensor is missing
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path):
    folder = folder_of(tmp_path)
    save_file({"w0": torch.ones(9), "old": torch.ones(2)}, folder / "consolidated.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["w0", "w1"]


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": -5}, {"total_size": "many"}, "text"])
def test_what_the_index_says_of_sizes_does_not_matter(tmp_path, metadata):
    assert len(open_checkpoint(folder_of(tmp_path, more={"metadata": metadata})).tensors) == 2


def test_two_names_of_one_file(tmp_path):
    """As on a disk that does not tell upper from lower case."""
    folder = folder_of(
        tmp_path, weight_map={"w0": NAMES[0], "w1": NAMES[0].upper().replace("SAFETENSORS", "safetensors")}
    )
    other = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))[0]
    assert refusal(folder).endswith(f"are missing, first {other}. Download the checkpoint again.")
    (folder / other).hardlink_to(folder / NAMES[0])
    assert refusal(folder) == f"{folder / NAMES[0]}: tensor 'w0' is stored twice, here and in {other}."


def test_a_download_cache_of_links_opens(tmp_path):
    """In the cache of huggingface_hub a file of a snapshot is a link to ../../blobs/HASH."""
    folder = folder_of(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.tensors) == ["w0", "w1"]
    assert checkpoint.fingerprint() == open_checkpoint(folder).fingerprint()


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0))."),
        (b'"text"', "expected a JSON object, got str."),
        (b"\xef\xbb\xbf{}", "not JSON (Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0))."),
        (b'{"a": "\xe4"}', "not JSON ('utf-8' codec can't decode byte 0xe4 in position 7: invalid continuation byte)."),
        (b'{"num_experts": 4, "num_experts": 8}', "not JSON (the key 'num_experts' is given more than once)."),
        (b'{"text_config": {"a": 1, "a": 1}}', "not JSON (the key 'a' is given more than once)."),
        (b'{"a":' * 100_000, "not JSON (nested too deeply)."),
    ],
)
def test_a_damaged_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {message}"


def test_a_config_of_a_gigabyte_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert str(error.value) == (f"{tmp_path / 'config.json'}: not JSON ({1 << 30} bytes, expected at most 100000000).")


def test_a_config_that_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)


def test_a_config_that_may_not_be_read(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(folder) == f"{folder / 'config.json'}: cannot be read (Permission denied)."


def test_a_config_with_infinity_is_read_and_can_be_written_again(tmp_path):
    """Nemotron-H's has "time_step_limit": [0.0, Infinity], which is not JSON; its readers know it."""
    text = '{\n  "time_step_limit": [\n    0.0,\n    Infinity\n  ]\n}\n'
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    assert config == {"time_step_limit": [0.0, float("inf")]}
    write_json(tmp_path / "again.json", config, allow_nan=True)
    assert (tmp_path / "again.json").read_text() == text


def test_a_config_that_sends_transformers_to_other_files(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert refusal(folder) == (
        f"{folder / 'config.json'}: transformers_weights 'other.safetensors' makes transformers read other files than "
        "all other readers. Delete that key, or rename the files."
    )
    (folder / "config.json").write_text('{"transformers_weights": null}')
    open_checkpoint(folder)


# Other formats


@pytest.mark.parametrize(
    ("files", "found", "way_out"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin", "It is a pickle, which can run code when it is read"),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
            "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin",
            "https://huggingface.co/spaces/safetensors/convert",
        ),
        (["model.pt"], "model.pt", "save_pretrained(NEW)"),
        (["model.pth", "model.pkl"], "model.pth", "pickle"),
        (
            [f"consolidated.{i}.pth" for i in range(8)],
            "consolidated.0.pth, consolidated.1.pth, consolidated.2.pth, ...", "their maker's own format",
        ),
        (["consolidated.safetensors"], "consolidated.safetensors", "their maker's own format"),
        (NAMES, ", ".join(NAMES), "The index is missing. Download the checkpoint again."),
        (["adapter_model.safetensors"], "adapter_model.safetensors", "It is an adapter, not a model."),
        (["adapter_model.bin"], "adapter_model.bin", "It is an adapter, not a model."),
        (["model.fp16.safetensors"], "model.fp16.safetensors", "Rename it if it holds the whole model."),
        (["model-Q4_K_M.gguf"], "model-Q4_K_M.gguf", "Give the GGUF file itself, not its folder."),
    ],
)  # fmt: skip
def test_weights_in_another_format(tmp_path, files, found, way_out):
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: expected model.safetensors or {INDEX}, found {found}. ")
    assert way_out in message


def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected model.safetensors or {INDEX}, found no weights. Download the checkpoint again, or save "
        "the model with `save_pretrained` first."
    )


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert len(open_checkpoint(folder).tensors) == 2


# Files that change or vanish


def test_a_shard_that_vanishes_after_opening(tmp_path):
    checkpoint = open_checkpoint(folder_of(tmp_path))
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.fingerprint()
    assert str(error.value) == f"{tmp_path / NAMES[1]}: cannot be read (No such file or directory)."


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 20])
def test_a_shard_that_changes_after_opening_changes_the_fingerprint(tmp_path, content):
    checkpoint = open_checkpoint(folder_of(tmp_path))
    before = checkpoint.fingerprint()
    (tmp_path / NAMES[1]).write_bytes(content)
    assert checkpoint.fingerprint() != before
