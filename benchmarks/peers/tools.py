"""The tools, and how one of them is asked in a process of its own. Imports no torch: see ``processes.run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import (
    LLM_COMPRESSOR,
    TRANSFORMERS_OF_REAP,
    Unavailable,
    clone_reap,
    make_environment,
)

PROGRAMS = Path(__file__).parent / "programs"
REPOSITORY = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
"""Set for every process: one thread, with which CPU seconds repeat; no network, no GPU."""


@dataclass(frozen=True)
class Tool:
    """One way to calibrate.

    Attributes:
        name: As printed.
        owner: ``moeprune``, ``llm-compressor`` or ``Cerebras``: whose environment it runs in.
        program: File in ``programs/``.
        what: Its setting.
        dtypes: In which it is timed; without any, only what it keeps is looked at.
    """

    name: str
    owner: str
    program: str
    what: str
    dtypes: tuple[str, ...] = ("float32",)


BOTH = ("float32", "bfloat16")
UNDONE = ("sequential, causal", "sequential, unpruned inputs", "sequential, causal, unpruned inputs")
TOOLS = (
    Tool("plain forward", "moeprune", "moeprune_reap.py", "plain", BOTH),
    Tool("moeprune, standard", "moeprune", "moeprune_reap.py", "standard", BOTH),
    Tool("moeprune, merge", "moeprune", "moeprune_reap.py", "merge", BOTH),
    Tool("llm-compressor, basic", "llm-compressor", "llmcompressor_reap.py", "basic", BOTH),
    Tool("llm-compressor, sequential", "llm-compressor", "llmcompressor_reap.py", "sequential"),
    *(Tool(f"llm-compressor, {what}", "llm-compressor", "llmcompressor_reap.py", what, ()) for what in UNDONE),
    Tool("llm-compressor, defaults", "llm-compressor", "llmcompressor_reap.py", "defaults"),
    Tool("Cerebras REAP", "Cerebras", "cerebras_reap.py", "pruning metrics only"),
)
PLAIN, OURS = TOOLS[:2]


@dataclass(frozen=True)
class Workplace:
    """Where each owner's programs run.

    Attributes:
        pythons: Interpreter of each owner.
        code: The code of REAP's authors.
        missing: Why an owner's tools cannot be run.
    """

    pythons: dict[str, Path]
    code: Path | None
    missing: dict[str, str]


def make_workplace(folder: Path, *, reap: str) -> Workplace:
    """Install what can be installed.

    Args:
        folder: Holds the environments.
        reap: git URL or folder of REAP's code.
    """
    pythons, missing, code = {"moeprune": Path(sys.executable)}, {}, None
    for owner, packages in (("llm-compressor", LLM_COMPRESSOR), ("Cerebras", TRANSFORMERS_OF_REAP)):
        try:
            python = make_environment(folder / owner, packages=packages)
            if owner == "Cerebras":
                code = clone_reap(folder / "reap", source=reap)
            pythons[owner] = python
        except Unavailable as error:
            missing[owner] = str(error)
    return Workplace(pythons, code, missing)


def ask(python: Path, program: str, **request: Any) -> dict[str, Any]:
    """Run a program of ``programs/`` and read its answer, the last line that it prints.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    done = subprocess.run(
        [str(python), str(PROGRAMS / program), json.dumps(request)],
        env={**os.environ, **QUIET, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{program} {request}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
