"""CPU seconds of a calibration pass over those of a plain forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.models import SMALL, make_qwen3_moe
from benchmarks.ratios import in_turn, ratios
from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.rows import Rows

ROWS, LENGTH, BATCH = 32, 512, 8


def measure(*, dtype: str, pairs: int) -> dict[str, Any]:
    """Plain passes and passes observed at two levels, in turn, over the same text.

    The plain pass runs experts as transformers does by default; ``eager`` is its other implementation, a loop.

    Args:
        dtype: Of the model.
        pairs: How often each is run.

    Returns:
        Median CPU seconds of each, and the ratios of each level to the plain pass of the same round.
    """
    torch.set_num_threads(1)
    model = make_qwen3_moe(SMALL, dtype=dtype)
    anatomy = derive_anatomy(model.config)
    facts = anatomy.facts(name="benchmark", fingerprint="-")
    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH))
    rows = Rows("text", ids, torch.ones_like(ids, dtype=torch.bool))

    def plain() -> None:
        with torch.inference_mode():
            for batch in rows.batches(BATCH):
                run_decoder(model, batch)

    def observed(statistics: str) -> None:
        collect_stats(
            model, anatomy=anatomy, facts=facts, domains=[rows], batch_size=BATCH, quiet=True, statistics=statistics
        )

    def eager() -> None:
        before = model.config._experts_implementation
        model.set_experts_implementation("eager")
        plain()
        model.set_experts_implementation(before)

    works = {
        "plain": plain, "standard": partial(observed, "standard"), "merge": partial(observed, "merge"), "eager": eager
    }  # fmt: skip
    return {
        "measured": "calibration / plain forward, CPU seconds, one thread",
        "dtype": dtype,
        "parameters": model.num_parameters(),
        "tokens": rows.num_tokens,
        "experts_implementation": model.config._experts_implementation,
        "rounds": pairs,
        **ratios(in_turn(works, rounds=pairs, clock=_cpu_seconds), over="plain"),
    }


def _cpu_seconds(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun
