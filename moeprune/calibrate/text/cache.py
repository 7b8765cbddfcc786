"""Tokenised text on disk, found again by a fingerprint of all that it depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune import __version__
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.sources import opening
from moeprune.data_spec import DataSpec
from moeprune.files import sha256_file, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
HASHED_WHOLE = 1 << 28
"""Bytes up to which local files are known by what is in them; larger ones are by path, size and time."""


def cache_dir() -> Path:
    """Where tokenised text is kept: ``$MOEPRUNE_CACHE``, else ``moeprune`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("MOEPRUNE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moeprune"


def fingerprint(spec: DataSpec, *, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str | None:
    """SHA-256 of everything that the rows of a domain depend on.

    Args:
        spec: The domain.
        tokenizer: The model's; known by its vocabulary, merges, special tokens and chat template.
        options: Whatever else decides the rows, as JSON values.

    Returns:
        64 hexadecimal digits; None for a tokenizer or data that cannot be told apart from a changed one.

    Raises:
        DataError: If a data set of the Hub cannot be opened.
    """
    words, data = _tokenizer_hash(tokenizer), _data_hash(spec)
    if words is None or data is None:
        return None
    versions = {"moeprune": __version__} | {name: version(name) for name in ("transformers", "tokenizers", "datasets")}
    facts = {"format": FORMAT, "versions": versions, "tokenizer": words, "data": data, "options": options}
    return sha256_json(facts | {"spec": spec.model_dump(mode="json")})


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json(
        {
            "type": type(tokenizer).__name__,
            "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": special,
            "template": tokenizer.chat_template,
        }
    )


def _data_hash(spec: DataSpec) -> str | None:
    files = spec.local_files
    if files:
        stats = [path.stat() for path in files]
        if sum(stat.st_size for stat in stats) <= HASHED_WHOLE:
            return sha256_json([[path.name, sha256_file(path)] for path in files])
        return sha256_json(
            [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)]
        )
    from datasets import load_dataset_builder

    with opening(spec):
        # For a data set of the Hub the hash is made of the revision and of the files that are read.
        found = load_dataset_builder(spec.source, spec.subset, data_files=spec.files).hash
    return str(found) if found else None


def load_rows(key: str, domain: str) -> Rows | None:
    """Rows that were kept under a fingerprint, or None; a damaged file counts as none.

    Args:
        key: The fingerprint.
        domain: Name of the domain.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):
        return None
    if facts.get("key") != key or facts.get("sha256") != _digest(tensors):
        return None
    return Rows(
        domain, tensors["ids"].long(), tensors["mask"], tensors.get("segments"), ragged=facts.get("ragged") == "True"
    )


def save_rows(rows: Rows, key: str) -> None:
    """Keep rows under a fingerprint, in one step; several processes may do so at once. Warns where there is no room."""
    from safetensors.torch import save_file

    tensors = {"ids": rows.ids.to(torch.int32), "mask": rows.mask}
    if rows.segments is not None:
        tensors["segments"] = rows.segments
    facts = {"key": key, "sha256": _digest(tensors), "ragged": str(rows.ragged)}
    path = _path(key)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Ranks on several machines may share the folder, and then also process ids.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        save_file(tensors, temporary, metadata=facts)
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: tokenised text was not kept ({error}); --no-cache does not try.", stacklevel=2)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _path(key: str) -> Path:
    return cache_dir() / "text" / f"{key}.safetensors"


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(repr(tuple(tensors[name].shape)).encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
