"""Export: a GGUF file and a plan to a pruned GGUF file, quantised blocks copied as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moeprune.errors import ExportError
from moeprune.files import locked
from moeprune.format import size
from moeprune.gguf.file import SUFFIX, GgufFile, is_gguf, open_gguf
from moeprune.gguf.match import match_plan
from moeprune.gguf.metadata import pruned_metadata
from moeprune.gguf.model import GgufModel, read_model
from moeprune.gguf.slices import OutputTensor, plan_outputs
from moeprune.gguf.write import data_size, write_gguf
from moeprune.plan.plan import Plan


@dataclass(frozen=True)
class GgufSizes:
    """Bytes and parameters before and after pruning; ``active`` is what one token uses."""

    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int


@dataclass(frozen=True)
class GgufSummary:
    """What an export writes, or would write.

    Attributes:
        source: The source, or its first part.
        target: The pruned file.
        tensors_kept: Tensors copied as they are.
        tensors_sliced: Tensors of which the kept experts' slices are copied.
        tensors_dropped: Tensors left out (of single experts).
        shards: Number of files written: always 1.
        sizes: Bytes and parameters before and after.
        warnings: What a user should know.
    """

    source: Path
    target: Path
    tensors_kept: int
    tensors_sliced: int
    tensors_dropped: int
    shards: int
    sizes: GgufSizes
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON."""
        return asdict(self) | {"source": str(self.source), "target": str(self.target)}


def export_gguf(
    path: str | Path, *, plan: Plan, out: Path, force: bool = False, dry_run: bool = False, quiet: bool = False
) -> GgufSummary:
    """Write the GGUF file that ``plan`` leaves of another.

    Args:
        path: The source; of a split model, any part. The result is one file.
        plan: A plan for the Hugging Face model that the source was converted from.
        out: The file to make, written as ``OUT.partial`` and renamed when complete. What a killed export left under
            that name is overwritten.
        force: Replace ``out`` if it exists.
        dry_run: Check everything and write nothing.
        quiet: No progress bar.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        UnsupportedModelError: If it has no experts, or stores them in a way that is not understood.
        PlanError: If the plan does not fit it.
        ExportError: If ``out`` exists, is not a ``.gguf`` name or cannot be written, or the disk is too small.
    """
    plan.check()
    file = open_gguf(path)
    model = read_model(file)
    outputs = plan_outputs(model, match_plan(model, plan))
    _check_target(out, file, force=force)
    _check_space(out, data_size(outputs, file.alignment))
    summary = _summarise(model, plan, outputs, out)
    if dry_run:
        return summary
    with (
        _explained(out),
        _partial(out) as temporary,
        tqdm(total=summary.sizes.bytes_after, unit="B", unit_scale=True, desc="export", disable=quiet) as bar,
    ):
        write_gguf(
            temporary, version=file.version, alignment=file.alignment, metadata=pruned_metadata(model, plan),
            tensors=outputs, progress=bar.update,
        )  # fmt: skip
    return summary


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A file beside ``out`` that gets its name when the block ends well, and is deleted when it does not."""
    partial = partial_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with locked(partial):
        try:
            yield partial
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Tell what the system refuses (permission, space, names) as what it is to the user."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"{error.filename or out}: {error.strerror or error}.") from error


def partial_of(out: Path) -> Path:
    """What the file is called while it is made."""
    return out.with_name(f"{out.name}.partial")


def _check_target(out: Path, source: GgufFile, *, force: bool) -> None:
    if not is_gguf(out):
        raise ExportError(
            f"{out}: the result of pruning a GGUF file is a GGUF file. Give a name that ends in {SUFFIX}."
        )
    if any(out.resolve() == file.resolve() for file in source.files):
        raise ExportError(f"{out}: is the source. Choose another name.")
    if out.is_dir():
        raise ExportError(f"{out}: is a folder. Choose another name.")
    if out.exists() and not force:
        raise ExportError(f"{out}: exists. Choose another name, or replace it with --force.")


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if partial_of(out).is_file():
        free += partial_of(out).stat().st_blocks * 512  # will be overwritten
    if free < needed:
        raise ExportError(f"{out}: needs {size(needed)}, only {size(free)} are free on that disk.")


def _summarise(model: GgufModel, plan: Plan, outputs: list[OutputTensor], out: Path) -> GgufSummary:
    sliced = sum(output.keep is not None for output in outputs)
    return GgufSummary(
        source=model.file.path,
        target=out,
        tensors_kept=len(outputs) - sliced,
        tensors_sliced=sliced,
        tensors_dropped=len(model.file.tensors) - len(outputs),
        shards=1,
        sizes=_sizes(model, plan, outputs),
        warnings=_warnings(model),
    )


def _sizes(model: GgufModel, plan: Plan, outputs: list[OutputTensor]) -> GgufSizes:
    return GgufSizes(
        bytes_before=model.file.num_bytes,
        bytes_after=sum(output.num_bytes for output in outputs),
        parameters_before=model.parameters,
        parameters_after=sum(prod(output.ne) for output in outputs),
        active_before=model.active(num_experts=model.num_experts, top_k=model.top_k[-1]),
        active_after=model.active(num_experts=plan.num_experts, top_k=plan.top_k),
    )


def _warnings(model: GgufModel) -> tuple[str, ...]:
    if not model.mtp_blocks:
        return ()
    return (
        f"blocks {list(model.mtp_blocks)} (multi-token prediction) keep the same experts as block {model.blocks[-1]}: "
        "calibration does not see theirs. Expect fewer accepted drafts where they are used.",
    )
