"""Time and memory of an export beside ``cp`` of the bytes that it keeps."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.caches import cached_share, cool, files_of, warm
from benchmarks.checkpoints import qwen3_moe, read_config, write_checkpoint
from benchmarks.processes import moeprune, run
from benchmarks.rehearsal import STATS_SCRIPT

CONFIG = Path(__file__).parents[1] / "tests" / "anatomy" / "published" / "Qwen3-30B-A3B.json"
LAYERS = {"half": 3, "whole": 6}  # 5.0 and 8.7 GB
SHARD_BYTES = 2 * 10**9
KEEP, TOP_K = 0.75, 6
MOSTLY = 0.97
TRIES = 20
EXPORT_SCRIPT = """
import json, sys, time
from pathlib import Path
import torch, transformers
from transformers.models.qwen3_moe import modeling_qwen3_moe  # imported lazily: an import, not a part of the export
from moeprune.export.export import export_checkpoint
from moeprune.plan.plan import Plan
status = lambda key: next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
baseline, begun = status("VmRSS"), time.perf_counter()
export_checkpoint(sys.argv[1], plan=Plan.load(Path(sys.argv[2])), out=Path(sys.argv[3]), quiet=True)
print(json.dumps({"seconds": time.perf_counter() - begun, "baseline_mib": baseline, "peak_mib": status("VmHWM")}))
"""


def measure(*, folder: Path, pairs: int) -> dict[str, Any]:
    """Alternate exports of a checkpoint of more than 8 GB with copies of the bytes that the export keeps.

    Warm means that what is read is in the page cache before the clock starts, cold that it is not; both are checked. As
    with ``cp`` alone, neither waits for the disk at the end.

    Args:
        folder: Holds the checkpoints; needs about 25 GB.
        pairs: Number of pairs of each kind.

    Returns:
        The median ratio of wall seconds with its range, cold and warm, and the peak resident memory over that after the
        imports, for this checkpoint and one of half the size.
    """
    memory = {}
    for name, layers in LAYERS.items():
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(folder / "source", ignore_errors=True)
        source_bytes = _make_checkpoint(folder / "source", layers=layers)
        _make_plan(folder / "source", folder)
        first = _export(folder)
        memory[name] = {
            "source_bytes": source_bytes,
            "baseline_mib": round(first["baseline_mib"]),
            "peak_mib_over_imports": round(first["peak_mib"] - first["baseline_mib"], 1),
        }
    kept = files_of(folder / "out")
    shutil.copytree(folder / "out", folder / "kept")  # what cp copies: the export's own output comes and goes
    return {
        "measured": "export / cp of the kept bytes, wall seconds",
        "source_bytes": memory["whole"]["source_bytes"],
        "kept_bytes": sum(file.stat().st_size for file in kept),
        "shards": sum(file.suffix == ".safetensors" for file in kept),
        "pairs": pairs,
        "warm": _compare(folder, pairs=pairs, prepare=warm, expected=lambda share: share >= MOSTLY),
        "cold": _compare(folder, pairs=pairs, prepare=cool, expected=lambda share: share <= 1 - MOSTLY),
        "memory": memory,
    }


def _compare(
    folder: Path, *, pairs: int, prepare: Callable[[list[Path]], None], expected: Callable[[float], bool]
) -> dict[str, Any]:
    runs: list[tuple[float, float]] = []
    shares: list[float] = []
    works = {
        "export": (folder / "source", lambda: _export(folder)["seconds"]),
        "cp": (folder / "kept", lambda: _copy(folder / "kept", folder / "copy")),
    }
    for pair in range(pairs):
        seconds = {}
        for what in ("export", "cp") if pair % 2 == 0 else ("cp", "export"):
            read, work = works[what]
            for written in ("out", "copy"):
                shutil.rmtree(folder / written, ignore_errors=True)
            os.sync()
            for other, _ in works.values():
                cool(files_of(other))
            shares.append(_prepared(read, prepare, expected))
            seconds[what] = work()
        runs.append((seconds["export"], seconds["cp"]))
    ratios = sorted(export / copy for export, copy in runs)
    return {
        "median_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "export_seconds": round(statistics.median(export for export, _ in runs), 2),
        "cp_seconds": round(statistics.median(copy for _, copy in runs), 2),
        "cached_before": [round(min(shares), 3), round(max(shares), 3)],
    }


def _prepared(folder: Path, prepare: Callable[[list[Path]], None], expected: Callable[[float], bool]) -> float:
    """Bring a folder into the page cache, or out of it, and return the share that is there.

    Raises:
        RuntimeError: If other programs do not let it be, for minutes.
    """
    share = -1.0
    for attempt in range(TRIES):
        time.sleep(15 * bool(attempt))
        prepare(files_of(folder))
        share = cached_share(files_of(folder))
        if expected(share):
            return share
    raise RuntimeError(f"{share:.1%} of {folder} are in the page cache: too little free memory for this measurement")


def _make_checkpoint(folder: Path, *, layers: int) -> int:
    config = read_config(CONFIG) | {"num_hidden_layers": layers, "max_window_layers": layers}
    tensors = list(qwen3_moe(config))
    total = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, _, shape in tensors)
    return write_checkpoint(
        folder, config=config, tensors=tensors, num_shards=max(1, round(total / SHARD_BYTES)), sparse=False
    )


def _make_plan(source: Path, folder: Path) -> None:
    stats, plan = folder / "stats.safetensors", folder / "plan.json"
    plan.unlink(missing_ok=True), stats.unlink(missing_ok=True)
    run(sys.executable, "-c", STATS_SCRIPT, source, stats)
    moeprune("plan", stats, "--score", "random", "--keep", KEEP, "--top-k", TOP_K, "--out", plan, "--quiet")


def _export(folder: Path) -> dict[str, float]:
    command = [folder / "source", folder / "plan.json", folder / "out"]
    return json.loads(run(sys.executable, "-c", EXPORT_SCRIPT, *command).output.splitlines()[-1])


def _copy(source: Path, target: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - begun
