"""All that is decided and checked before an export writes its first byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.source import Source, open_source
from moeprune.checkpoint.hub import Located, locate
from moeprune.checkpoint.values import check_finite
from moeprune.export.fetch import DOWNLOADS, bytes_to_download, check_cache_space
from moeprune.export.journal import job_of, read_finished
from moeprune.export.layout import Shard, lay_out
from moeprune.export.quantization_config import remapped_configs
from moeprune.export.routers import biases_of, check_choosable, router_dims
from moeprune.export.slices import plan_outputs
from moeprune.export.summary import ExportSummary, pruned_before, summarise
from moeprune.export.target import bytes_to_store, check_other_files, check_space, check_target, partial_of
from moeprune.plan.plan import Plan


@dataclass(frozen=True)
class Job:
    """An export that can be done.

    Attributes:
        source: The source; of one on the Hub, weights may not be here yet.
        located: Where it is and what of it is missing.
        plan: The plan.
        out: The folder to make.
        shards: The safetensors files to write.
        configs: JSON files to write by name, config.json last.
        key: Hash of what is exported (:func:`moeprune.export.journal.job_of`).
        earlier: What an attempt at this very job has finished; None if there was none.
        discarded: Bytes that an attempt at another job left in the same place.
    """

    source: Source
    located: Located
    plan: Plan
    out: Path
    shards: tuple[Shard, ...]
    configs: dict[str, Any]
    key: str
    earlier: dict[str, dict[str, Any]] | None
    discarded: int

    @property
    def partial(self) -> Path:
        """The folder to write to before all is complete."""
        return partial_of(self.out)

    @property
    def unfinished(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [shard for shard in self.shards if shard.name not in (self.earlier or {})]

    @cached_property
    def to_download(self) -> dict[str, int]:
        """Size by name of source files that are needed and not here."""
        return bytes_to_download(self.located, self.unfinished)

    @cached_property
    def summary(self) -> ExportSummary:
        """What will be written, in numbers."""
        return summarise(
            self.source,
            self.plan,
            self.shards,
            out=self.out,
            finished=self.earlier or {},
            discarded=self.discarded,
            to_download=sum(self.to_download.values()),
        )

    @cached_property
    def routers(self) -> dict[str, int]:
        """Tensors whose values are looked at, with the axis that counts the experts."""
        return router_dims(self.source)

    def check_download(self, name: str, path: Path) -> None:
        """Look at the routers in a source file that was not here before.

        Raises:
            CheckpointError: If one holds NaN.
            PlanError: If it cannot choose as many of the kept experts as a token uses.
        """
        self._check_routers(lambda file: path if file.name == name else None)

    def check_values(self) -> None:
        """Look at the routers in all files that are here.

        Raises:
            CheckpointError: If one holds NaN.
            PlanError: If it cannot choose as many of the kept experts as a token uses.
        """
        self._check_routers(lambda file: None if file.name in self.located.missing else file)

    def _check_routers(self, find: Callable[[Path], Path | None]) -> None:
        tensors = self.source.checkpoint.tensors
        here = {key: replace(tensors[key], file=file) for key in self.routers if (file := find(tensors[key].file))}
        biases = biases_of(self.source, {key: self.routers[key] for key in here})
        check_finite(here, expert_dims={key: self.routers[key] for key in here}, biases=biases)
        layers = {layer.layer: layer for layer in self.plan.layers}
        for key, layer in biases.items():
            check_choosable(here[key], layer=layers[layer], top_k=self.plan.top_k)


def prepare(
    model: str | Path,
    *,
    plan: Plan,
    out: Path,
    force: bool,
    max_bytes: int | None,
    jobs: int,
    link: bool,
    keep_source: bool,
) -> Job:
    """Decide what goes where, and refuse what cannot be done.

    Args:
        model: ``demo``, a folder or a Hub id.
        plan: A plan for this very model.
        out: The folder to make.
        force: Whether ``out`` may exist.
        max_bytes: Largest safetensors file.
        jobs: Shards written at once.
        link: Whether files that stay as they are become hard links.
        keep_source: Whether downloads stay.

    Raises:
        PlanError: If the plan does not fit the model.
        CheckpointError: If the source is incomplete or damaged, or a router holds NaN, or there is no such model.
        ExportError: If ``out`` exists or cannot be made, a disk is too small, or a file of the source may not be read.
    """
    located = locate(model)
    source = replace(open_source(located.folder), name=str(model))
    checkpoint = source.checkpoint
    plan.check(source.facts)
    shards = lay_out(
        plan_outputs(checkpoint.tensors, roles=source.roles, plan=plan, mtp=source.mtp),
        metadata=checkpoint.metadata,
        tensors_in=Counter(tensor.file for tensor in checkpoint.tensors.values()),
        max_bytes=max_bytes,
    )
    written = (tensor for shard in shards for tensor in shard.tensors)
    configs = remapped_configs(pruned_config(source, plan), source=source, plan=plan, outputs=written)
    check_target(out, source=checkpoint.path, force=force)
    check_other_files(checkpoint.path)
    key = job_of(checkpoint, plan=plan, shards=shards, commit=located.commit, link=link)
    earlier = read_finished(partial_of(out), job=key, shards=shards)
    discarded = 0 if earlier is not None else _bytes_of_shards(partial_of(out))
    job = Job(source, located, plan, out, shards, configs, key, earlier, discarded)
    _check_room(job, jobs=jobs, link=link, keep_source=keep_source)
    pruned_before(checkpoint)  # goes into the manifest: refused now rather than in the last step
    job.check_values()
    return job


def _check_room(job: Job, *, jobs: int, link: bool, keep_source: bool) -> None:
    downloads = job.to_download
    needed = bytes_to_store(job.unfinished, missing=job.located.missing, linked_in=job.out if link else None)
    if not keep_source:
        of_one = (sum(downloads.get(file.name, 0) for file in shard.files) for shard in job.unfinished)
        held = 0 if job.earlier is None else _bytes_of_shards(job.partial / DOWNLOADS)  # perhaps by more jobs
        needed += max(held, min(sum(downloads.values()), jobs * max(of_one, default=0)))
    check_space(job.out, needed, partial=job.partial, keep=job.earlier or {})
    if keep_source and downloads:
        check_cache_space(sum(downloads.values()), beside=needed, out=job.out)


def _bytes_of_shards(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def pruned_config(source: Source, plan: Plan) -> dict[str, Any]:
    """config.json of the pruned checkpoint, quantisation entries left as they are."""
    return prune_config_json(
        source.checkpoint.config,
        source.anatomy,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        n_group=plan.n_group,
        mtp=plan.mtp,
    )
