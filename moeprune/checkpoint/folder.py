"""A Hugging Face checkpoint folder: config.json and safetensors, read as named byte ranges."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.checkpoint.formats import explain_missing_weights
from moeprune.checkpoint.header import TensorInfo, read_header
from moeprune.errors import CheckpointError
from moeprune.files import read_json, shorten
from moeprune.resources import DEMO, DEMO_DIR

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 65_536
SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")  # no path: an index names files beside itself


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers have been read.

    Attributes:
        path: The folder.
        config: config.json as written, unknown keys included.
        shards: Its safetensors files, in the order of their names.
        tensors: Every stored tensor by name, shard by shard, in the order of its bytes.
        metadata: ``__metadata__`` of each shard by file name.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """SHA-256 over config, headers and the first and last 64 KiB of every shard's data.

        Reading a sample tells a fine-tuned sibling of the same shapes apart without reading hundreds of gigabytes.

        Raises:
            CheckpointError: If a shard can no longer be read.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            try:
                _digest_sample(shard, digest)
            except OSError as error:
                raise CheckpointError(f"{shard}: cannot be read ({error.strerror}).") from error
        return digest.hexdigest()


def resolve_model(model: str | Path) -> Path:
    """The local folder of a model.

    Args:
        model: ``demo`` (the embedded model), a folder, or a Hub id ``owner/name`` (optionally ``owner/name@revision``),
            which is downloaded by huggingface_hub into its cache.

    Raises:
        CheckpointError: If there is no such folder and the text is not a Hub id that can be fetched.
    """
    if str(model) == DEMO:
        return DEMO_DIR / "model"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{model}: expected the folder of a checkpoint, got a file. Give {path.parent} instead.")
    from moeprune.checkpoint.hub import download

    return download(str(model))


def is_local(model: str | Path) -> bool:
    """Whether a model is the embedded one or something on this disk, rather than one of the Hub."""
    return str(model) == DEMO or Path(model).expanduser().exists()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, as written (``Infinity``, which some configs hold, included).

    Raises:
        CheckpointError: If it is missing or not a JSON object, or if a key in it is given twice.
    """
    file = path / "config.json"
    if not _is_file(file):
        raise CheckpointError(
            f"{path}: no config.json. Give the folder that holds config.json and the safetensors files."
        )
    return read_object(file)


def has_weights(path: Path) -> bool:
    """Whether the folder holds safetensors files at all (a config alone can be inspected, not pruned)."""
    return any(path.glob("*.safetensors"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder: config and headers, no weight is read.

    A tensor that a shard holds and the index does not name belongs to the checkpoint: transformers, vLLM and SGLang
    take from the index only which files to read.

    Raises:
        CheckpointError: If files are missing, damaged or in another format, or index and headers disagree.
    """
    config = read_config(path)
    explicit = config.get("transformers_weights")
    if explicit is not None:
        raise CheckpointError(
            f"{path / 'config.json'}: transformers_weights {shorten(explicit)} makes transformers read other files "
            "than all other readers. Delete that key, or rename the files."
        )
    shards, weight_map = _shards(path)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, dict[str, str]] = {}
    for shard in shards:
        found, metadata[shard.name] = read_header(shard)
        twice = tensors.keys() & found.keys()
        if twice:
            name = min(twice)
            raise CheckpointError(f"{shard}: tensor {name!r} is stored twice, here and in {tensors[name].file.name}.")
        tensors |= found
    if not tensors:
        raise CheckpointError(f"{path}: its safetensors files hold no tensors. Download it again.")
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{path}: {INDEX_NAME} puts {name!r} in {file}, where it is not. Download it again.")
    return Checkpoint(path=path, config=config, shards=shards, tensors=tensors, metadata=metadata)


def _shards(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    index, single = path / INDEX_NAME, path / SINGLE_NAME
    if _is_file(index) and _is_file(single):
        raise CheckpointError(
            f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME}, and readers differ in which they take. "
            "Delete one of them."
        )
    if _is_file(single):
        return (single,), {}
    if not _is_file(index):
        raise CheckpointError(f"{path}: expected {SINGLE_NAME} or {INDEX_NAME}, {explain_missing_weights(path)}")
    weight_map = _weight_map(index)
    shards = tuple(path / name for name in sorted(set(weight_map.values())))
    missing = [shard.name for shard in shards if not _is_file(shard)]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards of {INDEX_NAME} are missing, first {missing[0]}. "
            "Download the checkpoint again."
        )
    return shards, weight_map


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map. Download it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index}: puts {shorten(name)} in {shorten(file)}; expected the name of a .safetensors file in the "
                "same folder."
            )
    return weight_map


def read_object(file: Path, *, allow_nan: bool = True) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: If the file cannot be read, is not a JSON object, or gives a key twice.
    """
    try:
        value = read_json(file, allow_nan=allow_nan)
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}).") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}.")
    return value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be searched
        return False


def _digest_sample(shard: Path, digest: hashlib._Hash) -> None:
    with shard.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = min(int.from_bytes(file.read(8), "little"), size)
        digest.update(file.read(length))
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(8 + length, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
