"""A checkpoint together with its anatomy: what every stage starts from. Headers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.formats import NOT_LOADED
from moeprune.anatomy.quantization import HF_QUANT_CONFIG, Quantisation, quantisation_of
from moeprune.anatomy.roles import Role
from moeprune.anatomy.skeleton import load_config
from moeprune.anatomy.stored import map_stored
from moeprune.checkpoint.folder import Checkpoint, open_checkpoint, read_object, resolve_model
from moeprune.checkpoint.global_scales import why_wrong
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
        mtp: The stored tensors of multi-token prediction layers.
        quantisation: How its weights are quantised, if they are.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    roles: dict[str, Role]
    mtp: frozenset[str] = frozenset()
    quantisation: Quantisation | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @cached_property
    def facts(self) -> ModelFacts:
        """What stats and plans carry of this model."""
        return self.anatomy.facts(name=self.name, fingerprint=self.checkpoint.fingerprint())

    @property
    def why_not_run(self) -> str | None:
        """Why transformers would not compute what the stored experts do; None if it does."""
        if self.quantisation is not None and self.quantisation.stored.loads in NOT_LOADED:
            return f"its weights are stored as {self.quantisation.title}, which transformers does not dequantise"
        return why_wrong(self.checkpoint.tensors)

    def check_runs(self) -> None:
        """Refuse to run a model whose experts transformers does not dequantise, or dequantises wrongly.

        Raises:
            UnsupportedModelError: Why, and what to do.
        """
        if self.why_not_run:
            raise UnsupportedModelError(
                f"{self.path}: {self.why_not_run}, so that its experts cannot be watched. Calibrate the unquantised "
                "checkpoint; its statistics are those of this one, too, as far as quantisation left the model alone."
            )


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
    beside = path / HF_QUANT_CONFIG
    quantisation = quantisation_of(checkpoint.config, hf_quant_config=read_object(beside) if beside.is_file() else None)
    anatomy = derive_anatomy(load_config(path))
    stored = map_stored(anatomy, checkpoint.tensors, stored=quantisation.stored if quantisation else None)
    return Source(str(model), checkpoint, anatomy, stored.roles, stored.mtp, quantisation)
