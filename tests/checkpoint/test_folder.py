"""Opening checkpoint folders, their fingerprints and their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, read_config, resolve_model
from moeprune.errors import CheckpointError
from moeprune.resources import DEMO_DIR
from tests.models import save
from tests.pruning import edit_config

INDEX = "model.safetensors.index.json"


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    return str(error.value)


def sharded(folder: Path) -> Path:
    return save("qwen3_moe", folder, shard="60KB")


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_sharded_checkpoint_opens_with_the_tensors_of_all_its_shards(tmp_path):
    folder = sharded(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    assert [shard.name for shard in checkpoint.shards] == shard_names(folder)
    assert len(checkpoint.shards) > 2
    stored = {key: tensor for shard in checkpoint.shards for key, tensor in load_file(shard).items()}
    assert checkpoint.tensors.keys() == stored.keys()
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.metadata == {name: {"format": "pt"} for name in shard_names(folder)}


def test_no_config(tmp_path):
    folder = save("mixtral", tmp_path / "m")
    (folder / "config.json").unlink()
    assert error_of(folder) == (
        f"{folder}: no config.json. Give the folder that holds config.json and the safetensors files."
    )


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    detail = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert str(error.value) == f"{tmp_path / 'config.json'}: not JSON ({detail})."


def test_a_config_that_is_a_list(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: expected a JSON object, got list."


def test_a_missing_shard(tmp_path):
    folder = sharded(tmp_path / "m")
    first, second, *_ = names = shard_names(folder)
    (folder / first).unlink()
    (folder / second).unlink()
    assert error_of(folder) == (
        f"{folder}: 2 of {len(names)} shards of {INDEX} are missing, first {first}. Download the checkpoint again."
    )


def test_an_index_that_puts_a_tensor_in_the_wrong_shard(tmp_path):
    folder = sharded(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    key = "model.layers.2.mlp.gate.weight"
    wrong = next(name for name in shard_names(folder) if name != index["weight_map"][key])
    index["weight_map"][key] = wrong
    (folder / INDEX).write_text(json.dumps(index))
    assert error_of(folder) == f"{folder}: {INDEX} puts {key!r} in {wrong}, where it is not. Download it again."


def test_a_tensor_that_two_shards_hold(tmp_path):
    folder = sharded(tmp_path / "m")
    key = "model.layers.0.mlp.gate.weight"
    home = json.loads((folder / INDEX).read_text())["weight_map"][key]
    other = next(name for name in shard_names(folder) if name > home)
    save_file(load_file(folder / other) | {key: torch.zeros(10, 32)}, folder / other)
    assert error_of(folder) == f"{folder / other}: tensor {key!r} is stored twice, here and in {home}."


def test_a_damaged_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "m")
    shard = folder / shard_names(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-2])
    assert error_of(folder).startswith(f"{shard}: tensor ")


# Fingerprints


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def fingerprint(folder: Path) -> str:
    return open_checkpoint(folder).fingerprint()


def test_a_copy_has_the_same_fingerprint(tmp_path):
    folder = sharded(tmp_path / "m")
    shutil.copytree(folder, tmp_path / "copy")
    assert len(fingerprint(folder)) == 64
    assert fingerprint(folder) == fingerprint(tmp_path / "copy")


def test_the_fingerprint_ignores_the_order_of_config_keys_but_not_their_values(tmp_path):
    folder = save("mixtral", tmp_path / "m")
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert fingerprint(folder) == before
    edit_config(folder, num_experts_per_tok=1)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("end", ["first", "last"])
def test_one_byte_at_either_end_of_a_shard_changes_the_fingerprint(tmp_path, end):
    folder = save("mixtral", tmp_path / "m")
    file = folder / "model.safetensors"
    before = fingerprint(folder)
    tensors = list(open_checkpoint(folder).tensors.values())
    flip(file, tensors[0].start if end == "first" else tensors[-1].end - 1)
    assert fingerprint(folder) != before


def test_one_router_byte_of_a_small_checkpoint_changes_the_fingerprint(tmp_path):
    folder = save("mixtral", tmp_path / "m")
    before = fingerprint(folder)
    router = open_checkpoint(folder).tensors["model.layers.1.block_sparse_moe.gate.weight"]
    flip(folder / "model.safetensors", router.start + 5)
    assert fingerprint(folder) != before


def test_one_byte_of_any_shard_changes_the_fingerprint(tmp_path):
    folder = sharded(tmp_path / "m")
    prints = {fingerprint(folder)}
    for name in shard_names(folder):
        flip(folder / name, -1)
        prints.add(fingerprint(folder))
    assert len(prints) == 1 + len(shard_names(folder))


def test_a_renamed_tensor_changes_the_fingerprint(tmp_path):
    folder = save("mixtral", tmp_path / "m")
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.0.block_sparse_moe.gate", b"layers.9.block_sparse_moe.gate"))
    assert fingerprint(folder) != before


def test_the_fingerprint_reads_both_ends_only(tmp_path):
    """Not a promise to users, but what keeps it fast: the middle of a large shard is not read."""
    save_file({"w": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    flip(tmp_path / "model.safetensors", 200_000)
    assert fingerprint(tmp_path) == before
    flip(tmp_path / "model.safetensors", 400_000)
    assert fingerprint(tmp_path) != before


# Names of models


def resolve_error(model: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve_model(model)
    return str(error.value)


def test_a_folder_and_the_demo_resolve_to_themselves(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("demo") == DEMO_DIR / "model"


def test_a_file_names_its_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert resolve_error(file) == f"{file}: expected the folder of a checkpoint, got a file. Give {tmp_path} instead."


@pytest.mark.parametrize("model", ["/no/such/folder", "./out/model", "a/b/c", "some-long-name"])
def test_a_folder_that_is_not_there(model):
    assert resolve_error(model) == (
        f"{model}: no such folder. Give the folder of a checkpoint, a Hub id (owner/name) or 'demo'."
    )


def test_a_misspelt_demo():
    assert resolve_error("dmeo") == (
        "dmeo: no such folder. Give the folder of a checkpoint, a Hub id (owner/name) or 'demo'. Did you mean 'demo'?"
    )


def test_an_empty_checkpoint_is_a_checkpoint_of_no_bytes(tmp_path):
    assert Checkpoint(tmp_path, {}, (), {}, {}).num_bytes == 0


def test_a_single_file_beside_an_index_is_ambiguous(tmp_path):
    save("mixtral", tmp_path / "a", shard="40KB")
    save("mixtral", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: holds both model.safetensors and model.safetensors.index.json, and readers differ in which "
        "they take. Delete one of them."
    )
