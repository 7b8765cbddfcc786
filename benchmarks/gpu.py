"""``python -m benchmarks gpu``: what calibration costs on an accelerator, and whether it sums what a CPU sums.

Needs torch, transformers and this repository, no network: models are made with random weights on the device itself. One
JSON object a line. ``--device cpu --tiny`` runs all of it anywhere, with figures that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.models import LARGE, SMALL, make_qwen3_moe
from benchmarks.ratios import in_turn, ratios
from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.source import open_source
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.checkpoint.load import load_model

TINY = SMALL | {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}
LEVELS = ("standard", "merge")
TOLERANCE = 1e-3
"""Largest difference between devices, over the largest sum of its kind; a near tie between experts that falls the other
way moves one token of the many hundreds of an expert."""


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        sizes: Of the model.
        rows: Number of rows of text.
        length: Tokens a row.
        batch_size: Rows a forward pass.
        compared: Tokens whose sums on the device and on the CPU are compared.
    """

    sizes: dict[str, Any]
    rows: int
    length: int
    batch_size: int
    compared: int


FULL, SMALLEST = Scale(LARGE, 64, 1024, 8, compared=16_384), Scale(TINY, 8, 64, 4, compared=1024)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--rounds", type=int, default=7, help="how often each pass is run (default 7)")
    parser.add_argument("--tiny", action="store_true", help="a very small model, to see that all of it runs")
    parser.add_argument("--folder", type=Path, help="for a checkpoint of 6 GB (default: a temporary folder)")
    parser.add_argument("--profile", action="store_true", help="also print what the passes spend their time on")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device. `--device cpu --tiny` shows that this runs, and nothing else.")
    scale = SMALLEST if given.tiny else FULL
    agree = True
    for line in measure(scale, device=given.device, rounds=given.rounds, folder=given.folder, profile=given.profile):
        print(json.dumps(line), flush=True)
        agree = agree and line.get("within_tolerance", True)
    if not agree:
        raise SystemExit("sums differ by more than the tolerance")


def measure(scale: Scale, *, device: str, rounds: int, folder: Path | None, profile: bool) -> Iterator[dict[str, Any]]:
    """Everything, one JSON object after another."""
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    yield {"measured": "machine", "device": kind, "torch": torch.__version__, "transformers": transformers.__version__}
    yield from compare_devices(device, tokens=scale.compared)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield from time_levels(scale, device=device, rounds=rounds, profile=profile, save=Path(made))
        yield from time_streaming(Path(made), scale, device=device, rounds=max(1, rounds // 3))


def compare_devices(device: str, *, tokens: int) -> Iterator[dict[str, Any]]:
    """The same small model and text on the CPU and on the device, in float32."""
    found = []
    rows = _text(SMALL, rows=16, length=tokens // 16)
    model = make_qwen3_moe(SMALL, dtype="float32")
    anatomy = derive_anatomy(model.config)
    for where in ("cpu", device):
        found.append(_observed(model.to(where), anatomy, rows, batch_size=4, statistics="merge"))
    yield {"measured": "sums on the device beside those on the CPU, float32", **differences(*found)}


def differences(expected: Stats, other: Stats) -> dict[str, Any]:
    """Of each array, the largest difference over the largest value of its layer; both must have the same arrays."""
    assert [name for name, _ in expected.arrays()] == [name for name, _ in other.arrays()]
    found = {}
    for (name, a), (_, b) in zip(expected.arrays(), other.arrays(), strict=True):
        found[name] = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
    return {
        "tokens": float(expected.tokens.sum()),
        "largest_relative_difference": {name: float(f"{value:.3g}") for name, value in found.items()},
        "within_tolerance": max(found.values()) <= TOLERANCE,
    }


def time_levels(scale: Scale, *, device: str, rounds: int, profile: bool, save: Path) -> Iterator[dict[str, Any]]:
    """Plain forward passes and both levels of statistics in turn, in bfloat16; keeps the model as a checkpoint."""
    rows = _text(scale.sizes, rows=scale.rows, length=scale.length)
    model = make_qwen3_moe(scale.sizes, dtype="bfloat16", device=device)
    anatomy = derive_anatomy(model.config)

    def plain() -> None:
        with torch.inference_mode():
            for batch in rows.batches(scale.batch_size):
                run_decoder(model, batch)

    def observed(statistics: str) -> None:
        _observed(model, anatomy, rows, batch_size=scale.batch_size, statistics=statistics)

    works: dict[str, Callable[[], None]] = {"plain": plain} | {level: partial(observed, level) for level in LEVELS}
    seconds = in_turn(works, rounds=rounds, clock=partial(_wall_seconds, device=device))
    yield {
        "measured": "calibration / plain forward, synchronised wall seconds, bfloat16",
        "parameters": model.num_parameters(),
        "tokens": rows.num_tokens,
        "experts_implementation": model.config._experts_implementation,
        "rounds": rounds,
        **ratios(seconds, over="plain"),
        "model_mib": _mib(sum(parameter.nbytes for parameter in model.parameters())),
        "peak_mib_over_model": {name: _peak_mib(work, device) for name, work in works.items()},
    }
    if profile:
        for name, work in works.items():
            print(f"{name}:\n{_profile(work, device)}", file=sys.stderr)
    model.save_pretrained(save)


def time_streaming(folder: Path, scale: Scale, *, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A checkpoint calibrated layer by layer and as a whole, loading included; the file cache is warm in both."""
    source = open_source(str(folder))
    rows = _text(scale.sizes, rows=scale.rows, length=scale.length)
    stats: dict[str, Stats] = {}

    def whole() -> None:
        model = load_model(folder, dtype="bfloat16", device=device)
        stats["whole"] = _observed(model, source.anatomy, rows, batch_size=scale.batch_size, statistics="standard")

    def streamed() -> None:
        stats["streamed"] = stream_stats(
            source, rows=[rows], batch_size=scale.batch_size, dtype="bfloat16", device=device, quiet=True
        )

    works = {"whole model": whole, "streamed": streamed}
    seconds = in_turn(works, rounds=rounds, clock=partial(_wall_seconds, device=device))
    yield {
        "measured": "calibration layer by layer / of the whole model, loading included, synchronised wall seconds",
        "rounds": rounds,
        **ratios(seconds, over="whole model"),
        "checkpoint_mib": _mib(sum(file.stat().st_size for file in folder.glob("*.safetensors"))),
        "peak_mib": {name: _peak_mib(work, device) for name, work in works.items()},
        **differences(stats["whole"], stats["streamed"]),
    }


def _text(sizes: dict[str, Any], *, rows: int, length: int) -> Rows:
    ids = torch.randint(sizes["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    return Rows("text", ids, torch.ones_like(ids, dtype=torch.bool))


def _observed(model: Any, anatomy: Anatomy, rows: Rows, *, batch_size: int, statistics: str) -> Stats:
    return collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="benchmark", fingerprint="-"), domains=[rows],
        batch_size=batch_size, quiet=True, statistics=statistics,
    )  # fmt: skip


def _wall_seconds(work: Callable[[], None], *, device: str) -> float:
    _synchronise(device)
    begun = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - begun


def _peak_mib(work: Callable[[], None], device: str) -> float | None:
    """What a work adds to the device's memory, as torch counts it; nothing is known of a CPU."""
    if not device.startswith("cuda"):
        work()
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return _mib(torch.cuda.max_memory_allocated(device) - before)


def _profile(work: Callable[[], None], device: str) -> str:
    from torch.profiler import ProfilerActivity, profile

    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        work()
    return found.key_averages().table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=20)


def _mib(num_bytes: int) -> float:
    return round(num_bytes / (1 << 20), 1)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
