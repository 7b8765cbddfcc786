"""Inputs of every MoE layer for a sample of tokens, kept for methods that need real activations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune.calibrate.sample import TokenSample
from moeprune.checkpoint.header import encode_header
from moeprune.errors import RoomError, StatsError
from moeprune.facts import ModelFacts

NAME = "inputs"


class Reservoir:
    """A safetensors file with ``inputs``, (layers, tokens, hidden) in bfloat16, written in place while the model runs.

    What stands where depends on the sample alone, so that several processes can write one file, each its own tokens.
    Beside it are ``domain``, ``row`` and ``position`` of every token, (tokens,) int64. A token that no process has
    written is all zeros.
    """

    def __init__(self, path: Path, model: ModelFacts, *, sample: TokenSample, hidden: int, fresh: bool = True):
        """Make the file, or open one that was begun.

        Args:
            path: The file.
            model: Whose inputs they are.
            sample: Which tokens.
            hidden: Size of a hidden state.
            fresh: Make the file; otherwise another process has made it.

        Raises:
            StatsError: If a file that was begun is missing, or of another model or another sample.
            RoomError: If the file cannot be made.
        """
        shape = (len(model.layers), sample.num_tokens, hidden)
        places = np.stack([sample.domain, sample.row, sample.position]).astype(np.int64)
        entries = [(name, "I64", (sample.num_tokens,), places[0].nbytes) for name in ("domain", "row", "position")]
        meta = {"format": 1, "model": model.model_dump(mode="json")}
        header = encode_header(
            [*entries, (NAME, "BF16", shape, int(np.prod(shape)) * 2)], {"moeprune": json.dumps(meta)}
        )
        begin = len(header) + places.nbytes
        if fresh:
            _make(path, header + places.tobytes(), size=begin + int(np.prod(shape)) * 2)
        elif not path.is_file():
            raise StatsError(
                f"{path}: the layer inputs that a run had begun to keep are not there. Several machines need a folder "
                "that they share; where the file was removed, remove the unfinished sums (OUT.partial), too."
            )
        else:
            with path.open("rb") as file:
                if file.read(begin) != header + places.tobytes():
                    raise StatsError(f"{path}: layer inputs of another model or another sample. Remove the file.")
        self._words = np.memmap(path, dtype=np.int16, mode="r+", offset=begin, shape=shape)

    def write(self, layer: int, slots: Int[Tensor, " sampled"], inputs: Float[Tensor, "sampled hidden"]) -> None:
        """Put the inputs of one layer in the places of their tokens."""
        self._words[layer, slots.numpy()] = inputs.to(torch.bfloat16).cpu().view(torch.int16).numpy()

    def close(self) -> None:
        """Write what is still in memory."""
        self._words.flush()


def _make(path: Path, begin: bytes, *, size: int) -> None:
    """Make a file of ``size`` bytes, zeros after ``begin``, with its room on the disk reserved.

    Writing through a memory map to a disk that is full ends a process without a word.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(size)
            file.flush()
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise RoomError(
            f"{path}: a file of {size / 1e9:.2f} GB for the inputs of the sampled tokens cannot be made there "
            f"({error.strerror}). Give another place with --keep-inputs, or leave it out."
        ) from error


def read_inputs(path: Path, model: ModelFacts, *, layer: int) -> Float[Tensor, "tokens hidden"]:
    """The kept inputs of one layer, bfloat16.

    Args:
        path: A file that :class:`Reservoir` wrote.
        model: The model that is asked for.
        layer: Index of the MoE layer.

    Raises:
        StatsError: If the file is missing, of another kind, or of another model.
    """
    if not path.is_file():
        raise StatsError(f"{path}: no such file of layer inputs. `moeprune calibrate --stats full` makes it.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("moeprune", "{}"))
            if "model" not in meta:
                raise StatsError(f"{path}: a safetensors file, but not layer inputs of moeprune.")
            if meta["model"]["fingerprint"] != model.fingerprint:
                raise StatsError(f"{path}: layer inputs of {meta['model']['name']}, not of {model.name}.")
            return file.get_slice(NAME)[layer]
    except SafetensorError as error:
        raise StatsError(f"{path}: not a complete file of layer inputs ({error}). Calibrate again.") from error
