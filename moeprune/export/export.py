"""Export: source checkpoint and plan to a slimmed checkpoint, by copying bytes."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moeprune import __version__
from moeprune.anatomy.pruned_config import prune_config_json
from moeprune.anatomy.sizes import PrunedSizes, measure_sizes, pruned_sizes
from moeprune.anatomy.source import Source, open_source
from moeprune.checkpoint.folder import INDEX_NAME, Checkpoint
from moeprune.errors import ExportError
from moeprune.export.card import read_card, write_card
from moeprune.export.shards import write_shards
from moeprune.export.slices import OutputTensor, plan_outputs
from moeprune.files import read_json, write_json
from moeprune.format import size
from moeprune.plan.plan import Plan

MANIFEST = "moeprune.json"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
WRITTEN_HERE = {"config.json", "README.md", INDEX_NAME, MANIFEST}


@dataclass(frozen=True)
class ExportSummary:
    """What an export writes, or would write.

    Attributes:
        source: Folder of the source.
        target: Folder of the pruned checkpoint.
        tensors_kept: Tensors copied as they are.
        tensors_sliced: Tensors of which the kept experts' slices are copied.
        tensors_dropped: Tensors left out.
        shards: Number of safetensors files.
        sizes: Bytes and parameters before and after.
    """

    source: Path
    target: Path
    tensors_kept: int
    tensors_sliced: int
    tensors_dropped: int
    shards: int
    sizes: PrunedSizes

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON."""
        return asdict(self) | {"source": str(self.source), "target": str(self.target)}


def export_checkpoint(
    model: str | Path,
    *,
    plan: Plan,
    out: Path,
    name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> ExportSummary:
    """Write the checkpoint that ``plan`` leaves of ``model``.

    The result is made in ``OUT.partial`` and renamed when complete, so that a killed export leaves no folder that looks
    like a checkpoint; running it again starts afresh.

    Args:
        model: ``demo``, a folder or a Hub id.
        plan: A plan for this very model.
        out: The folder to make.
        name: Name in the model card; by default that of the folder.
        force: Replace ``out`` if it exists.
        dry_run: Check everything and write nothing.
        quiet: No progress bar.

    Raises:
        PlanError: If the plan does not fit the model.
        ExportError: If ``out`` exists, the disk is too small, or the source's model card cannot be read.
    """
    source = open_source(model)
    checkpoint, anatomy = source.checkpoint, source.anatomy
    plan.check(source.facts)
    outputs = plan_outputs(checkpoint.tensors, roles=source.roles, keep=plan.keep)
    summary = _summarise(source, plan, outputs, out)
    check_target(out, source=checkpoint.path, force=force)
    _check_space(out, summary.sizes.bytes_after)
    source_card = read_card(checkpoint.path / "README.md")
    if dry_run:
        return summary
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tqdm(total=summary.sizes.bytes_after, unit="B", unit_scale=True, desc="export", disable=quiet) as bar:
        write_shards(outputs, folder=partial, metadata=checkpoint.metadata, progress=bar.update)
    for relative in other_files(checkpoint.path):
        (partial / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkpoint.path / relative, partial / relative)
    write_card(
        partial / "README.md", plan=plan, sizes=summary.sizes, source_card=source_card,
        name=name or out.name, version=__version__,
    )  # fmt: skip
    write_json(partial / MANIFEST, _manifest(checkpoint, plan, summary))
    config = prune_config_json(
        checkpoint.config, anatomy, num_experts=plan.num_experts, top_k=plan.top_k, n_group=plan.n_group
    )
    write_json(partial / "config.json", config)  # last: without it the folder is not a checkpoint
    replaced = out.with_name(f"{out.name}.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
    return summary


def check_target(out: Path, *, source: Path, force: bool) -> None:
    """Refuse to overwrite anything that was not asked for.

    Raises:
        ExportError: If ``out`` exists without ``force``, or is not an export, or holds the source.
    """
    resolved = out.resolve()
    if source.resolve().is_relative_to(resolved) or resolved.is_relative_to(source.resolve()):
        raise ExportError(f"{out}: lies in or around the source {source}. Choose another folder.")
    if not out.exists():
        return
    if not force:
        raise ExportError(f"{out}: exists. Choose another folder, or replace it with --force.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ExportError(
            f"{out}: --force replaces only checkpoints that moeprune wrote, and this is not one. Delete it."
        )


def other_files(folder: Path) -> Iterator[Path]:
    """Files that belong to the model and hold no weights: tokenizer, templates, generation config, code, licence.

    Hidden files, and folders that hold weights in another format (``original/``, ``onnx/``), are left out.
    """
    with_weights = {
        path.relative_to(folder).parts[0]
        for path in folder.glob("*/**/*")
        if path.suffix in WEIGHT_SUFFIXES and len(path.relative_to(folder).parts) > 1
    }
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        weights = path.suffix in WEIGHT_SUFFIXES or relative.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights and relative.parts[0] not in with_weights | WRITTEN_HERE:
            yield relative


def _summarise(source: Source, plan: Plan, outputs: dict[Path, list[OutputTensor]], out: Path) -> ExportSummary:
    written = [tensor for tensors in outputs.values() for tensor in tensors]
    sliced = sum(tensor.keep is not None for tensor in written)
    sizes = measure_sizes(source.anatomy, source.checkpoint.tensors)
    summary = ExportSummary(
        source=source.checkpoint.path,
        target=out,
        tensors_kept=len(written) - sliced,
        tensors_sliced=sliced,
        tensors_dropped=len(source.checkpoint.tensors) - len(written),
        shards=len(outputs),
        sizes=pruned_sizes(sizes, num_experts=plan.num_experts, top_k=plan.top_k),
    )
    total = sum(tensor.num_bytes for tensor in written)
    assert total == summary.sizes.bytes_after, f"{total} bytes to write, {summary.sizes.bytes_after} expected"
    return summary


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in [out.resolve(), *out.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ExportError(f"{out}: needs {size(needed)}, only {size(free)} are free on that disk.")


def _manifest(checkpoint: Checkpoint, plan: Plan, summary: ExportSummary) -> dict[str, Any]:
    earlier = checkpoint.path / MANIFEST
    return {
        "format": 1,
        "source": {"name": plan.model.name, "fingerprint": plan.model.fingerprint},
        "plan": plan.model_dump(mode="json"),
        "sizes": asdict(summary.sizes),
        "versions": {
            "moeprune": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "pruned_before": read_json(earlier) if earlier.is_file() else None,
    }
