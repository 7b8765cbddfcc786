"""A checkpoint together with its anatomy: what every stage starts from. Headers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.skeleton import load_config
from moeprune.anatomy.stored import Role, map_stored
from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, resolve_model
from moeprune.errors import UnsupportedModelError
from moeprune.facts import ModelFacts


@dataclass(frozen=True)
class Source:
    """A model that can be pruned.

    Attributes:
        name: As the user wrote it.
        checkpoint: Its folder, headers read.
        anatomy: Where its experts are.
        roles: The stored tensors that depend on experts.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    roles: dict[str, Role]

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @cached_property
    def facts(self) -> ModelFacts:
        """What stats and plans carry of this model."""
        return self.anatomy.facts(name=self.name, fingerprint=self.checkpoint.fingerprint())


def open_source(model: str | Path) -> Source:
    """Open a checkpoint and map its experts.

    Args:
        model: ``demo``, a folder or a Hub id.

    Raises:
        CheckpointError: If it is not a complete checkpoint.
        UnsupportedModelError: If it cannot be pruned.
    """
    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    quantised = checkpoint.config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UnsupportedModelError(
            f"{path}: stored quantised ({method}). Pruning quantised checkpoints is not supported yet; "
            "prune the unquantised checkpoint and quantise the result."
        )
    anatomy = derive_anatomy(load_config(path))
    return Source(str(model), checkpoint, anatomy, map_stored(anatomy, checkpoint.tensors))
