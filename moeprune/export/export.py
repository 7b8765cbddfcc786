"""Export: source checkpoint and plan to a slimmed checkpoint, by copying bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from moeprune import __version__
from moeprune.checkpoint.folder import INDEX_NAME
from moeprune.checkpoint.hub import quiet_downloads
from moeprune.errors import ExportError, MoePruneError
from moeprune.export.card import read_card, write_card
from moeprune.export.fetch import DOWNLOADS, HubSources
from moeprune.export.journal import JOURNAL, Journal, clear
from moeprune.export.layout import parse_size
from moeprune.export.prepare import Job, prepare
from moeprune.export.shards import default_jobs, write_index, write_shards
from moeprune.export.summary import ExportSummary, manifest
from moeprune.export.target import MANIFEST, copy_other_files, other_files, put_in_place
from moeprune.files import locked, read_json, write_json
from moeprune.interrupts import Interrupted, interruptible
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
    keep_source: bool = True,
) -> ExportSummary:
    """Write the checkpoint that ``plan`` leaves of ``model``.

    The result is made in ``OUT.partial`` and renamed when complete, so that a killed export leaves no folder that looks
    like a checkpoint. Running the same export again keeps the shards that were finished.

    Args:
        model: ``demo``, a folder or a Hub id. The shards of the latter are downloaded when they are needed.
        plan: A plan for this very model.
        out: The folder to make.
        name: Name in the model card; by default that of the folder.
        force: Replace ``out`` if it exists.
        dry_run: Check everything and write nothing.
        quiet: No progress bar.
        max_shard_size: Largest safetensors file, such as ``5GB``; by default the source's boundaries stay.
        jobs: Shards written at once; by default :func:`moeprune.export.shards.default_jobs`.
        link: Hard link files that stay as they are instead of copying them. They then share their bytes with the
            source: a program that edits one in place changes both.
        keep_source: Keep what is downloaded in the cache of huggingface_hub. Otherwise a shard is deleted when it has
            been used, and no more than ``jobs`` of them take up room at a time.

    Raises:
        PlanError: If the plan does not fit the model.
        CheckpointError: If the source is incomplete or damaged, or a router holds NaN, or there is no such model.
        ExportError: If ``out`` exists or cannot be made, a disk is too small or fails, or the source's model card
            cannot be read.
        Interrupted: At SIGINT or SIGTERM.
    """
    jobs = default_jobs() if jobs is None else max(1, jobs)
    max_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    with _explained(out):
        job = prepare(
            model, plan=plan, out=out, force=force, max_bytes=max_bytes, jobs=jobs, link=link, keep_source=keep_source
        )
        source_card = read_card(job.source.path / "README.md")
        if dry_run:
            return job.summary
        partial = job.partial
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            journal = _write_weights(job, jobs=jobs, link=link, keep_source=keep_source, quiet=quiet)
            copy_other_files(job.source.path, partial)
            write_card(
                partial / "README.md", plan=plan, sizes=job.summary.sizes, source_card=source_card,
                name=name or out.resolve().name, version=__version__,
            )  # fmt: skip
            origin = {"repo": job.located.repo, "commit": job.located.commit} if job.located.repo else {}
            record = manifest(job.source.checkpoint, plan, job.summary.sizes, origin=origin, files=journal.finished)
            write_json(partial / MANIFEST, record)
            for file, text in job.configs.items():  # config.json last: without it the folder is not a checkpoint
                write_json(partial / file, text, allow_nan=True)  # Nemotron-H's config has an Infinity
            put_in_place(partial, out)
    return job.summary


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Tell what the system refuses (permission, space, names), and how to go on after an interrupt."""
    try:
        with interruptible():
            yield
    except Interrupted as stop:
        stop.note = "Finished files are kept; run the same command again."
        raise
    except OSError as error:
        if isinstance(error, MoePruneError):
            raise
        raise ExportError(f"{error.filename or out}: {error.strerror or error}.") from error


def _write_weights(job: Job, *, jobs: int, link: bool, keep_source: bool, quiet: bool) -> Journal:
    partial, index = job.partial, job.source.path / INDEX_NAME
    journal = Journal(partial, job=job.key, finished=job.earlier)  # first: with it the folder is known as an export's
    downloads = [] if job.earlier is None or keep_source else [DOWNLOADS]
    clear(partial, keep=[JOURNAL, *downloads, *(job.earlier or {})])
    sources = HubSources(
        job.located,
        shards=job.unfinished,
        folder=None if keep_source else partial / DOWNLOADS,
        check=job.check_download,
    )
    total = sum(job.summary.files.values())
    with (
        quiet_downloads(quiet),
        tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=quiet) as bar,
    ):
        write_shards(
            job.shards, folder=partial, journal=journal, sources=sources, jobs=jobs, link=link, progress=bar.update
        )
    shutil.rmtree(partial / DOWNLOADS, ignore_errors=True)
    metadata = read_json(index).get("metadata") if index.is_file() else None
    write_index(job.shards, folder=partial, metadata=metadata, num_parameters=job.summary.sizes.parameters_after)
    return journal
