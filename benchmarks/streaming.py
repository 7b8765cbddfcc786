"""``python -m benchmarks.streaming``: memory and time of calibration layer by layer beside the whole-model pass.

Each pass is a process of its own, with one thread, on a checkpoint that is made here; they are run in turn, and the
median of the ratios of neighbours is printed. Memory is the largest resident size less that after all imports. What a
batch needs while it is run, its activations, is measured in the whole-model pass and the same in both.

oneDNN keeps a compiled product for every number of tokens that an expert was given, with its scratch memory, and malloc
keeps freed pieces below 32 MiB: hundreds of MiB that belong to neither pass. Both are switched off where memory is
measured, in one more run of each pass, and left as they are where time is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MIB = 1 << 20
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "intermediate_size": 2048, "vocab_size": 32_000, "norm_topk_prob": True,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
ROWS, LENGTH, BATCH = 16, 512, 4
PASSES = ("whole", "streamed", "offloaded")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NOTHING_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def make(folder: Path) -> int:
    """Write a checkpoint of 16 layers and 1.7 GB, a shard a layer; return its bytes."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.checkpoints import qwen3_moe

    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    names: dict[str, str] = {}
    total = 0
    for name, _, shape in qwen3_moe(CONFIG):
        layer = name.split(".")[2] if ".layers." in name else "other"
        shard = f"model-{layer}.safetensors"
        drawn = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.03
        shards.setdefault(shard, {})[name] = drawn.to(torch.bfloat16)
        names[name] = shard
        total += drawn.numel() * 2
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def calibrate(kind: str, folder: Path, out: Path) -> dict[str, Any]:
    """One pass in this process: seconds with and without loading, memory over imports and over weights in MiB."""
    import torch

    import moeprune.calibrate.streaming.passes as streaming
    from moeprune.anatomy.source import open_source
    from moeprune.calibrate.passes import collect_stats
    from moeprune.calibrate.rows import Rows
    from moeprune.checkpoint.load import load_model

    torch.set_num_threads(1)
    source = open_source(folder)
    _ = source.facts, load_model, torch.inference_mode
    ids = torch.randint(int(CONFIG["vocab_size"]), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [Rows("text", ids, torch.ones_like(ids, dtype=torch.bool))]
    warm_up()
    before, begun, loaded_at, working = resident("VmRSS"), clocks(), (0.0, 0.0), 0
    if kind == "whole":
        model = load_model(folder, device="cpu")
        loaded_at, peak, loaded = since(begun), resident("VmHWM"), resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        stats = collect_stats(
            model, anatomy=source.anatomy, facts=source.facts, domains=rows, batch_size=BATCH, quiet=True
        )
        working = resident("VmHWM") - loaded
        peak = max(peak, resident("VmHWM"))
    else:
        hidden = out.with_suffix(".hidden") if kind == "offloaded" else None
        stats = streaming.stream_stats(
            source, rows=rows, batch_size=BATCH, device="cpu", quiet=True, offload_hidden=hidden
        )
        peak = resident("VmHWM")
    wall, cpu = since(begun)
    stats.save(out)
    return {
        "wall": wall,
        "cpu": cpu,
        "wall_of_pass": wall - loaded_at[0],
        "cpu_of_pass": cpu - loaded_at[1],
        "peak_mib": (peak - before) / MIB,
        "working_mib": working / MIB,
    }


def clocks() -> tuple[float, float]:
    """Wall and CPU seconds; the latter of all threads."""
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float]) -> tuple[float, float]:
    """Wall and CPU seconds since then."""
    wall, cpu = clocks()
    return wall - begun[0], cpu - begun[1]


def warm_up() -> None:
    """Load the libraries that the first matrix product loads."""
    import torch

    torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)


def resident(field: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def sizes() -> dict[str, float]:
    """What streaming should keep in memory, in MiB, from the config."""
    import math

    from benchmarks.checkpoints import qwen3_moe

    of_layer = embedding = 0
    for name, _, shape in qwen3_moe(CONFIG):
        of_layer += 2 * math.prod(shape) * (".layers.0." in name)
        embedding += 2 * math.prod(shape) * (name == "model.embed_tokens.weight")
    hidden = ROWS * LENGTH * int(CONFIG["hidden_size"]) * 2
    return {"embedding": embedding / MIB, "layer": of_layer / MIB, "hidden": hidden / MIB}


def in_process(kind: str, folder: Path, out: Path, **environment: str) -> dict[str, Any]:
    """:func:`calibrate` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", kind, str(folder), str(out)]
    variables = {**os.environ, **ONE_THREAD, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    return json.loads(done.stdout.splitlines()[-1])


def measure(*, folder: Path, pairs: int) -> dict[str, Any]:
    """All passes in turn, ``pairs`` times.

    Returns:
        Medians of time and memory, ratios of time to the whole-model pass of the same round, what streaming should keep
        and the largest relative difference of a sum.
    """
    import numpy as np

    from moeprune.calibrate.stats import Stats

    checkpoint = folder / "model"
    checkpoint.mkdir()
    total = make(checkpoint)
    rounds = [{kind: in_process(kind, checkpoint, folder / f"{kind}.stats") for kind in PASSES} for _ in range(pairs)]
    whole = dict(Stats.load(folder / "whole.stats").arrays())
    difference = 0.0
    for kind in PASSES[1:]:
        for name, array in Stats.load(folder / f"{kind}.stats").arrays():
            size = max(float(np.abs(whole[name]).max()), 1e-30)
            difference = max(difference, float(np.abs(array - whole[name]).max()) / size)
    memory = {kind: in_process(kind, checkpoint, folder / f"{kind}.stats", **NOTHING_KEPT) for kind in PASSES}
    parts = sizes() | {"working": memory["whole"]["working_mib"]}
    return {
        "measured": "calibration layer by layer, one thread, seconds and resident MiB over imports",
        "checkpoint_mib": round(total / MIB),
        "layers": CONFIG["num_hidden_layers"],
        "tokens": ROWS * LENGTH,
        "rounds": pairs,
        "keeps_mib": {name: round(size) for name, size in parts.items()},
        "expected_mib": round(sum(parts.values()) + parts["layer"]),
        "peak_mib": {kind: round(memory[kind]["peak_mib"]) for kind in PASSES},
        "peak_mib_with_caches": {kind: round(median(r[kind]["peak_mib"] for r in rounds)) for kind in PASSES},
        "wall_seconds": {kind: round(median(r[kind]["wall"] for r in rounds), 1) for kind in PASSES},
        "cpu_seconds": {kind: round(median(r[kind]["cpu"] for r in rounds), 1) for kind in PASSES},
        "wall_over_loading_and_whole_pass": _ratios(rounds, "wall", "wall"),
        "wall_over_whole_pass": _ratios(rounds, "wall", "wall_of_pass"),
        "cpu_over_loading_and_whole_pass": _ratios(rounds, "cpu", "cpu"),
        "cpu_over_whole_pass": _ratios(rounds, "cpu", "cpu_of_pass"),
        "largest_relative_difference": difference,
    }


def _ratios(rounds: list[dict[str, Any]], of_streamed: str, of_whole: str) -> dict[str, float]:
    return {kind: round(median(r[kind][of_streamed] / r["whole"][of_whole] for r in rounds), 3) for kind in PASSES[1:]}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint of 1.7 GB is made (default: /tmp)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, out = arguments.child
        print(json.dumps(calibrate(kind, Path(folder), Path(out))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(folder=Path(folder), pairs=arguments.pairs), indent=2))


if __name__ == "__main__":
    main()
