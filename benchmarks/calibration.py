"""CPU seconds of a calibration pass over those of a plain forward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.data import Rows
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.passes import collect_stats

ROWS, LENGTH, BATCH = 16, 512, 8


def measure(*, dtype: str, pairs: int) -> dict[str, Any]:
    """Alternate plain and observed passes over the same text.

    Args:
        dtype: Of the model.
        pairs: Number of pairs.

    Returns:
        The median ratio with its range, and the median CPU seconds of both.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_experts=64, num_experts_per_tok=8,
        moe_intermediate_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).eval()
    anatomy = derive_anatomy(config)
    facts = anatomy.facts(name="benchmark", fingerprint="-")
    rows = Rows("text", torch.randint(config.vocab_size, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.bool))

    def plain() -> None:
        with torch.inference_mode():
            for ids, mask in zip(rows.ids.split(BATCH), rows.mask.split(BATCH), strict=True):
                run_decoder(model, Rows(rows.domain, ids, mask))

    def observed() -> None:
        collect_stats(model, anatomy=anatomy, facts=facts, domains=[rows], batch_size=BATCH, quiet=True)

    plain(), observed()
    times = []
    for pair in range(pairs):
        order = (plain, observed) if pair % 2 == 0 else (observed, plain)
        seconds = {work: _cpu_seconds(work) for work in order}
        times.append((seconds[plain], seconds[observed]))
    ratios = sorted(b / a for a, b in times)
    return {
        "measured": "calibration / plain forward, CPU seconds, one thread",
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": rows.num_tokens,
        "pairs": pairs,
        "plain_seconds": round(statistics.median(a for a, _ in times), 3),
        "calibration_seconds": round(statistics.median(b for _, b in times), 3),
        "median_ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _cpu_seconds(work: Any) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun
