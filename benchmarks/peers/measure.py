"""Time all tools in turn, compare the experts that they keep, and ask whether calibration is causal.

This process only starts others and imports no torch, so that their peak memory is their own (see ``processes.run``).
The tools are run in turn, forwards and backwards, and each is compared with the others of its round: the machine may be
shared. CPU seconds with one thread repeat well; wall seconds hold whatever else the machine did.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.peers.tools import OURS, PLAIN, TOOLS, Tool, Workplace, ask, make_workplace

KEEP, BATCH, LENGTH = 0.5, 8, 512
Key = tuple[Tool, str]
Answers = dict[Key, list[dict[str, Any]]]


def measure(*, folder: Path, rounds: int, tokens: int, reap: str) -> Iterator[dict[str, Any]]:
    """Everything, one JSON object after another.

    Args:
        folder: Holds environments (2 GB; used again if they are there) and inputs.
        rounds: How often each tool is run.
        tokens: Of calibration text.
        reap: git URL or folder of the code of REAP's authors.
    """
    place = make_workplace(folder, reap=reap)
    yield from ({"measured": "nothing", "tool": owner, "why": why} for owner, why in place.missing.items())
    with tempfile.TemporaryDirectory(dir=folder) as inputs:
        yield from _measured(place, Path(inputs), rounds=rounds, tokens=tokens)


def _measured(place: Workplace, inputs: Path, *, rounds: int, tokens: int) -> Iterator[dict[str, Any]]:
    made = ask(place.pythons["moeprune"], "inputs.py", folder=str(inputs), tokens=tokens, length=LENGTH)
    answers = _run_in_turn(place, inputs, rounds=rounds)
    load = answers[OURS, "float32"][-1]["load"]
    yield {
        "measured": "inputs of all tools", **made, "length": LENGTH, "batch_size": BATCH,
        "load_least_to_most": [[round(value, 2) for value in layer] for layer in load],
    }  # fmt: skip
    for key in answers:
        yield _time_of(key, answers)
    for model in ("random", "trained"):
        kept = {tool: runs[-1] for (tool, dtype), runs in answers.items() if (model, dtype) == ("random", "float32")}
        for tool in _usable(place):
            if tool not in kept and tool != PLAIN:
                kept[tool] = _run(place, tool, inputs, model=model, dtype="float32")
        yield from _agreement(model, kept)
    if "llm-compressor" in place.pythons:
        for model in ("random", "trained"):
            asked = {"model": str(inputs / model), "ids": str(inputs / "ids.safetensors"), "keep": KEEP}
            found = ask(place.pythons["llm-compressor"], "causality.py", **asked)
            yield {"measured": "what tokens see of those after them, by llm-compressor", "model": model, **found}


def _usable(place: Workplace) -> list[Tool]:
    return [tool for tool in TOOLS if tool.owner in place.pythons]


def _run(place: Workplace, tool: Tool, inputs: Path, *, model: str, dtype: str) -> dict[str, Any]:
    return ask(
        place.pythons[tool.owner], tool.program, what=tool.what, model=str(inputs / model), dtype=dtype, keep=KEEP,
        ids=str(inputs / "ids.safetensors"), batch_size=BATCH, code=str(place.code),
    )  # fmt: skip


def _run_in_turn(place: Workplace, inputs: Path, *, rounds: int) -> Answers:
    keys = [(tool, dtype) for dtype in ("float32", "bfloat16") for tool in _usable(place) if dtype in tool.dtypes]
    answers: Answers = {key: [] for key in keys}
    for number in range(rounds):
        for tool, dtype in keys if number % 2 == 0 else keys[::-1]:
            answers[tool, dtype].append(_run(place, tool, inputs, model="random", dtype=dtype))
    return answers


def _time_of(key: Key, answers: Answers) -> dict[str, Any]:
    tool, dtype = key
    cpu = [run["cpu_seconds"] for run in answers[key]]

    def times(other: Tool) -> dict[str, float]:
        ratios = [own / run["cpu_seconds"] for own, run in zip(cpu, answers[other, dtype], strict=True)]
        return {
            "median": round(statistics.median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3)
        }  # fmt: skip

    return {
        "measured": "from a loaded model and token ids to kept experts, one thread",
        "tool": tool.name,
        "dtype": dtype,
        "versions": answers[key][-1]["versions"],
        "rounds": len(cpu),
        "cpu_seconds": round(statistics.median(cpu), 2),
        "wall_seconds": round(statistics.median(run["wall_seconds"] for run in answers[key]), 2),
        "times_plain": times(PLAIN),
        "times_moeprune": times(OURS),
        "peak_mib": round(max(run["peak_mib"] for run in answers[key])),
        "work_mib": round(max(run.get("work_mib", float("nan")) for run in answers[key])),
    }


def _agreement(model: str, answers: dict[Tool, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    ours = answers[OURS]
    for tool, answer in answers.items():
        if tool.owner == "moeprune":
            continue
        pairs = [(set(a), set(b)) for a, b in zip(ours["kept"], answer["kept"], strict=True)]
        found: dict[str, Any] = {
            "measured": "kept experts in common with moeprune's reap",
            "model": model,
            "tool": tool.name,
            "kept": len(pairs[0][0]),
            "common": [len(a & b) for a, b in pairs],
            "jaccard": [round(len(a & b) / len(a | b), 3) for a, b in pairs],
        }
        if "saliency" in answer:
            scores = zip(chain(*ours["saliency"]), chain(*answer["saliency"]), strict=True)
            found["largest_relative_difference_of_scores"] = max(abs(a - b) / max(a, b, 1e-30) for a, b in scores)
        yield found
