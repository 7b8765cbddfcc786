"""What an export writes, in numbers, and the record that it leaves of itself."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moeprune import __version__
from moeprune.anatomy.sizes import PrunedSizes, measure_sizes, pruned_sizes
from moeprune.anatomy.source import Source
from moeprune.checkpoint.folder import Checkpoint, read_object
from moeprune.export.layout import Shard
from moeprune.export.target import MANIFEST
from moeprune.plan.plan import Plan


@dataclass(frozen=True)
class ExportSummary:
    """What an export writes, or would write.

    Attributes:
        source: Folder of the source.
        target: Folder of the pruned checkpoint.
        tensors_kept: Tensors copied as they are.
        tensors_sliced: Tensors of which the kept experts' part is written.
        tensors_dropped: Tensors left out.
        bytes_kept: Bytes of the tensors copied as they are.
        bytes_sliced: Bytes that are written of the sliced tensors.
        bytes_dropped: Bytes of the source that are left out, of sliced tensors and of dropped ones.
        files: Bytes of each safetensors file by name.
        finished: Those of them that an earlier, killed attempt has finished.
        discarded: Bytes that an earlier attempt left and that are of no use, since its plan, source or options differ.
        to_download: Bytes of source files that are not here yet.
        not_read: Safetensors files beside the source's that its index does not name: no reader takes them for a part of
            it, and neither does the export.
        sizes: Bytes and parameters before and after.
    """

    source: Path
    target: Path
    tensors_kept: int
    tensors_sliced: int
    tensors_dropped: int
    bytes_kept: int
    bytes_sliced: int
    bytes_dropped: int
    files: dict[str, int]
    finished: tuple[str, ...]
    discarded: int
    to_download: int
    not_read: tuple[str, ...]
    sizes: PrunedSizes

    @property
    def shards(self) -> int:
        """Number of safetensors files."""
        return len(self.files)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON."""
        return asdict(self) | {"source": str(self.source), "target": str(self.target), "shards": self.shards}


def summarise(
    source: Source,
    plan: Plan,
    shards: Sequence[Shard],
    *,
    out: Path,
    finished: Collection[str],
    discarded: int,
    to_download: int,
) -> ExportSummary:
    """Count what an export writes.

    Args:
        source: The source.
        plan: The plan.
        shards: The files to write.
        out: The folder to make.
        finished: Names of files that are there already.
        discarded: Bytes of an earlier attempt that are of no use.
        to_download: Bytes of source files that are not here yet.
    """
    count: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        kind = "kept" if tensor.is_copy else "sliced"
        count[kind] += 1
        num_bytes[kind] += tensor.num_bytes
    sizes = measure_sizes(source.anatomy, source.checkpoint.tensors, quantisation=source.quantisation)
    return ExportSummary(
        source=source.checkpoint.path,
        target=out,
        tensors_kept=count["kept"],
        tensors_sliced=count["sliced"],
        tensors_dropped=len(source.checkpoint.tensors) - count.total(),
        bytes_kept=num_bytes["kept"],
        bytes_sliced=num_bytes["sliced"],
        bytes_dropped=source.checkpoint.num_bytes - num_bytes.total(),
        files={shard.name: shard.num_bytes for shard in shards},
        finished=tuple(sorted(finished)),
        discarded=discarded,
        to_download=to_download,
        not_read=_not_read(source.checkpoint),
        sizes=replace(
            pruned_sizes(sizes, num_experts=plan.num_experts, top_k=plan.top_k),
            bytes_before=source.checkpoint.num_bytes,
            bytes_after=num_bytes.total(),
        ),
    )


def _not_read(checkpoint: Checkpoint) -> tuple[str, ...]:
    named = {shard.name for shard in checkpoint.shards}
    return tuple(sorted(file.name for file in checkpoint.path.glob("*.safetensors") if file.name not in named))


def manifest(
    checkpoint: Checkpoint,
    plan: Plan,
    sizes: PrunedSizes,
    *,
    origin: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What ``moeprune.json`` says of a pruned checkpoint.

    Args:
        checkpoint: The source.
        plan: The plan.
        sizes: Bytes and parameters before and after.
        origin: Repository and commit of the source, if it came from the Hub.
        files: Size and hash of each safetensors file.
    """
    return {
        "format": 1,
        "source": {"name": plan.model.name, "fingerprint": plan.model.fingerprint, **origin},
        "plan": plan.model_dump(mode="json"),
        "sizes": asdict(sizes),
        "files": dict(sorted(files.items())),
        "versions": {
            "moeprune": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "pruned_before": pruned_before(checkpoint),
    }


def pruned_before(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The source's own ``moeprune.json``, if it has one.

    Raises:
        CheckpointError: If it is damaged.
    """
    earlier = checkpoint.path / MANIFEST
    return read_object(earlier, allow_nan=False) if earlier.is_file() else None
