"""What the stages of a run share: the folder, the recipe, and the model, loaded when first needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.anatomy.sizes import ModelSizes, measure_sizes
from moeprune.anatomy.source import Source, open_source
from moeprune.data_mix import expand_data
from moeprune.data_spec import DataSpec
from moeprune.files import sha256_file
from moeprune.plan.plan import Plan
from moeprune.recipe import Evaluation, PlanSettings, Recipe
from moeprune.resources import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeprune.calibrate.job import Job
    from moeprune.calibrate.rows import Rows


@dataclass
class Workspace:
    """One run.

    Attributes:
        recipe: What to do.
        out: The run folder.
        device: Where the model runs.
        quiet: No progress bars.
    """

    recipe: Recipe
    out: Path
    device: str = "auto"
    quiet: bool = False

    @cached_property
    def source(self) -> Source:
        """The model's checkpoint and anatomy."""
        return open_source(self.recipe.model)

    @cached_property
    def sizes(self) -> ModelSizes:
        """Its parameters and bytes."""
        source = self.source
        return measure_sizes(source.anatomy, source.checkpoint.tensors, quantisation=source.quantisation)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        from moeprune.checkpoint.load import load_tokenizer

        return load_tokenizer(self.source.path)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The original model in memory."""
        from moeprune.checkpoint.load import load_model

        return load_model(self.source.path, dtype=self.recipe.dtype, device=self.device)

    @cached_property
    def rows(self) -> list[Rows]:
        """The calibration text."""
        return self.job.rows

    @cached_property
    def job(self) -> Job:
        """The calibration run."""
        from moeprune.calibrate.job import How, Job
        from moeprune.calibrate.ranks import Ranks
        from moeprune.checkpoint.load import choose_device

        return Job(
            self.source, out=self.stats_path, settings=self.recipe.calibrate,
            how=How(dtype=self.recipe.dtype, quiet=self.quiet), ranks=Ranks(device=choose_device(self.device)),
            load=lambda: self.model,
        )  # fmt: skip

    @cached_property
    def data(self) -> tuple[DataSpec, ...]:
        """The calibration domains, ``demo`` and mixes resolved; without those of the model's own answers."""
        return expand_data(self.recipe.calibrate.data, tokens=self.recipe.calibrate.tokens)

    @property
    def plans(self) -> tuple[PlanSettings, ...]:
        """The variants."""
        return self.recipe.plans

    @property
    def stats_path(self) -> Path:
        """The calibration statistics."""
        return self.out / "stats.safetensors"

    def plan_path(self, name: str) -> Path:
        """The plan of one variant."""
        return self.out / "plans" / f"{name}.json"

    def eval_path(self, name: str) -> Path:
        """The item-by-item scores of one variant, or of the original."""
        return self.out / "eval" / f"{name}.json"

    def plan(self, name: str) -> Plan:
        """The plan of one variant, from its file."""
        return Plan.load(self.plan_path(name))

    def pruned(self, name: str) -> PreTrainedModel:
        """One variant in memory."""
        from moeprune.apply.memory import apply_plan

        return apply_plan(self.model, plan=self.plan(name), anatomy=self.source.anatomy)


def task_folder(evaluation: Evaluation) -> Path:
    """The folder with the recipe's task files."""
    return evaluation.include or shipped("eval") / "offline"


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder of tasks, by relative path."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
