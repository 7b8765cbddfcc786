"""Export: source checkpoint and plan to a slimmed checkpoint, by copying bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moeprune import __version__
from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.source import Source, open_source
from moeprune.checkpoint.folder import INDEX_NAME
from moeprune.checkpoint.values import check_finite
from moeprune.export.card import read_card, write_card
from moeprune.export.journal import JOURNAL, Journal, clear, job_of, locked, read_finished
from moeprune.export.layout import Shard, lay_out, parse_size
from moeprune.export.quantization_config import remapped_configs
from moeprune.export.routers import router_dims
from moeprune.export.shards import write_index, write_shards
from moeprune.export.slices import plan_outputs
from moeprune.export.summary import ExportSummary, manifest, summarise
from moeprune.export.target import (
    MANIFEST,
    bytes_to_store,
    check_space,
    check_target,
    copy_other_files,
    other_files,
    put_in_place,
)
from moeprune.files import read_json, write_json
from moeprune.plan.plan import Plan

__all__ = ["MANIFEST", "ExportSummary", "export_checkpoint", "other_files"]


def export_checkpoint(
    model: str | Path,
    *,
    plan: Plan,
    out: Path,
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    max_shard_size: str | int | None = None,
    jobs: int | None = None,
    link: bool = False,
) -> ExportSummary:
    """Write the checkpoint that ``plan`` leaves of ``model``.

    The result is made in ``OUT.partial`` and renamed when complete, so that a killed export leaves no folder that looks
    like a checkpoint. Running the same export again keeps the shards that were finished.

    Args:
        model: ``demo``, a folder or a Hub id.
        plan: A plan for this very model.
        out: The folder to make.
        name: Name in the model card; by default that of the folder.
        force: Replace ``out`` if it exists.
        dry_run: Check everything and write nothing.
        quiet: No progress bar.
        max_shard_size: Largest safetensors file, such as ``5GB``; by default the source's boundaries stay.
        jobs: Shards written at once.
        link: Hard link files that stay as they are instead of copying them. They then share their bytes with the
            source: a program that edits one in place changes both.

    Raises:
        PlanError: If the plan does not fit the model.
        CheckpointError: If the source is incomplete or damaged, or a router holds NaN.
        ExportError: If ``out`` exists, the disk is too small, or the source's model card cannot be read.
    """
    max_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    source = open_source(model)
    checkpoint = source.checkpoint
    plan.check(source.facts)
    shards = lay_out(
        plan_outputs(checkpoint.tensors, roles=source.roles, plan=plan, mtp=source.mtp),
        metadata=checkpoint.metadata,
        tensors_in=Counter(tensor.file for tensor in checkpoint.tensors.values()),
        max_bytes=max_bytes,
    )
    written = (tensor for shard in shards for tensor in shard.tensors)
    configs = remapped_configs(_config(source, plan), source=source, plan=plan, outputs=written)
    check_target(out, source=checkpoint.path, force=force)
    partial = out.with_name(f"{out.name}.partial")
    job = job_of(checkpoint, plan=plan, shards=shards, commit=None)
    finished = read_finished(partial, job=job, shards=shards)
    summary = summarise(source, plan, shards, out=out, finished=finished, to_download=0)
    missing = [shard for shard in shards if shard.name not in finished]
    check_space(out, bytes_to_store(missing), partial=partial, keep=finished)
    source_card = read_card(checkpoint.path / "README.md")
    check_finite(checkpoint.tensors, expert_dims=router_dims(source))
    if dry_run:
        return summary
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        journal = Journal(partial, job=job, finished=finished)
        clear(partial, keep=[JOURNAL, *finished] if finished else [])
        _write_weights(source, shards, journal, partial, summary, jobs=jobs, link=link, quiet=quiet)
        copy_other_files(checkpoint.path, partial)
        write_card(
            partial / "README.md", plan=plan, sizes=summary.sizes, source_card=source_card,
            name=name or out.name, version=__version__,
        )  # fmt: skip
        record = manifest(checkpoint, plan, summary.sizes, origin={}, files=journal.finished)
        write_json(partial / MANIFEST, record)
        for file, text in configs.items():  # config.json last: without it the folder is not a checkpoint
            write_json(partial / file, text, allow_nan=True)  # Nemotron-H's config has an Infinity
        put_in_place(partial, out)
        (out / JOURNAL).unlink()
    return summary


def _write_weights(
    source: Source,
    shards: Sequence[Shard],
    journal: Journal,
    folder: Path,
    summary: ExportSummary,
    *,
    jobs: int | None,
    link: bool,
    quiet: bool,
) -> None:
    index = source.path / INDEX_NAME
    metadata = read_json(index).get("metadata") if index.is_file() else None
    with tqdm(total=sum(summary.files.values()), unit="B", unit_scale=True, desc="export", disable=quiet) as bar:
        write_shards(shards, folder=folder, journal=journal, jobs=jobs, link=link, progress=bar.update)
    write_index(shards, folder=folder, metadata=metadata, num_parameters=summary.sizes.parameters_after)


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    return prune_config_json(
        source.checkpoint.config,
        source.anatomy,
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        n_group=plan.n_group,
    )
