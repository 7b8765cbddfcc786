"""Time and memory of an export beside ``cp`` of the bytes that it keeps."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

KEEP = 0.75
EXPORT_SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from moeprune.export.export import export_checkpoint
from moeprune.plan.plan import Plan
import torch, transformers
from transformers.models.qwen3_moe import modeling_qwen3_moe  # imported lazily: an import, not a part of the export
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
baseline = peak()
begun = time.perf_counter()
export_checkpoint(sys.argv[1], plan=Plan.load(Path(sys.argv[2])), out=Path(sys.argv[3]), force=True, quiet=True)
print(json.dumps({"seconds": time.perf_counter() - begun, "baseline_mib": baseline, "peak_mib": peak()}))
"""


def measure(*, folder: Path, pairs: int) -> dict[str, Any]:
    """Alternate exports of a checkpoint of more than 2 GB with copies of the bytes that the export keeps.

    Args:
        folder: Holds the checkpoints; needs about 7 GB.
        pairs: Number of pairs.

    Returns:
        The median ratio of wall seconds with its range, and the peak resident memory over that after the imports.
    """
    source, plan, out, copy = folder / "source", folder / "plan.json", folder / "out", folder / "copy"
    _make_checkpoint(source)
    _make_plan(source, plan)
    first = _export(source, plan, out)
    kept = sum(file.stat().st_size for file in out.iterdir())
    runs, ratios = [first], []
    for pair in range(pairs):
        seconds = {}
        for what in ("export", "cp") if pair % 2 == 0 else ("cp", "export"):
            if what == "export":
                runs.append(_export(source, plan, out))
                seconds[what] = runs[-1]["seconds"]
            else:
                seconds[what] = _copy(out, copy)
        ratios.append(seconds["export"] / seconds["cp"])
        last_cp = seconds["cp"]
    return {
        "measured": "export / cp of the kept bytes, wall seconds",
        "source_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "kept_bytes": kept,
        "pairs": pairs,
        "export_seconds": round(statistics.median(run["seconds"] for run in runs), 2),
        "cp_seconds_last": round(last_cp, 2),
        "median_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "peak_mib_over_imports": round(max(run["peak_mib"] - run["baseline_mib"] for run in runs), 1),
    }


def _make_checkpoint(folder: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=6, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=960, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4, head_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.save_pretrained(folder, max_shard_size="1GB")


def _make_plan(source: Path, path: Path) -> None:
    from moeprune.anatomy.source import open_source
    from moeprune.calibrate.stats import Stats
    from moeprune.plan.uniform import make_plan

    stats = Stats.zeros(open_source(source).facts, domains=["none"])
    stats.tokens[:] = 1
    make_plan(stats, score="random", keep=KEEP, top_k=6).save(path)


def _export(source: Path, plan: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", EXPORT_SCRIPT, str(source), str(plan), str(out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _copy(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - begun
