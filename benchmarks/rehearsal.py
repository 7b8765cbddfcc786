"""A rehearsal at full scale: a checkpoint like DeepSeek-V3, 671 B parameters, of sparse files that take no room."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import deepseek_v3, read_config, write_checkpoint
from benchmarks.processes import Run, moeprune, run

CONFIG = Path(__file__).parents[1] / "tests" / "anatomy" / "published" / "DeepSeek-V3.json"
NUM_SHARDS = 163
KEEP, TOP_K = 0.5, 6
STATS_SCRIPT = """
import sys
from pathlib import Path
from moeprune.anatomy.source import open_source
from moeprune.calibrate.stats import Stats
stats = Stats.zeros(open_source(sys.argv[1]).facts, domains=["none"])
stats.tokens[:] = 1
stats.save(Path(sys.argv[2]))
"""


def measure(*, folder: Path) -> dict[str, Any]:
    """Inspect, plan, dry-run and export the model; inspect the result.

    Args:
        folder: Holds the checkpoints; its file system must have sparse files.

    Returns:
        Wall seconds and peak resident memory of each step, imports included.
    """
    source, out, stats, plan = folder / "source", folder / "out", folder / "stats.safetensors", folder / "plan.json"
    config = read_config(CONFIG)
    apparent = write_checkpoint(
        source, config=config, tensors=deepseek_v3(config), num_shards=NUM_SHARDS, sparse=True
    )  # fmt: skip
    steps: dict[str, Run] = {"inspect": moeprune("inspect", source, "--json")}
    run(sys.executable, "-c", STATS_SCRIPT, source, stats)
    steps["plan"] = moeprune("plan", stats, "--score", "random", "--keep", KEEP, "--top-k", TOP_K, "--out", plan)
    command = ["export", source, "--plan", plan, "--out", out, "--json", "--quiet"]
    steps["export --dry-run"] = moeprune(*command, "--dry-run")
    steps["export"] = moeprune(*command)
    steps["inspect of the result"] = moeprune("inspect", out, "--json")
    before, after = (json.loads(steps[name].output) for name in ("inspect", "inspect of the result"))
    exported = json.loads(steps["export"].output)
    return {
        "measured": "a rehearsal on sparse files in the layout of DeepSeek-V3",
        "parameters": before["parameters"]["total"],
        "parameters_after": after["parameters"]["total"],
        "source_bytes": apparent,
        "written_bytes": sum(exported["files"].values()),
        "tensors": exported["tensors_kept"] + exported["tensors_sliced"] + exported["tensors_dropped"],
        "shards": NUM_SHARDS,
        "taken_on_disk": sum(file.stat().st_blocks * 512 for each in (source, out) for file in each.iterdir()),
        "steps": {
            name: {"seconds": round(step.seconds, 1), "peak_mib": round(step.peak_mib)} for name, step in steps.items()
        },
    }
