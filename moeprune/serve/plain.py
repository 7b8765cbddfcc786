"""A first plain tokens/s from transformers, labelled as such.

It says how models compare on this machine in one library. Inference engines (vLLM, SGLang) batch, schedule and fuse
differently, so the ratio between two models may differ there.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from moeprune.errors import EvaluationError

WARM_UP_TOKENS = 4


def measure_throughput(
    models: Mapping[str, nn.Module],
    *,
    batch: int = 8,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measures prefill and greedy decoding of several models in turn.

    In each repeat every model runs once, so that a machine that slows down slows all of them. Prompts are random
    tokens, the same for models with the same vocabulary; every sequence makes ``new_tokens`` steps, end-of-text tokens
    or not. A warm-up of each model is not counted.

    Args:
        models: Causal language models by name, each on its device.
        batch: Sequences at once.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Decoding steps.
        repeats: Measurements of each model.
        seed: Seeds the prompts.
        progress: Whether to show a progress bar.

    Returns:
        For each model ``{"engine": "transformers", "device", "dtype", "batch", "prompt_tokens", "new_tokens",
        "prefill_tokens_per_second", "decode_tokens_per_second"}``, the last two as ``{"median", "min", "max", "n"}`` in
        tokens a second over the whole batch.

    Raises:
        EvaluationError: A size below 1.
    """
    sizes = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, size in sizes.items():
        if size < 1:
            raise EvaluationError(f"Expected {name} of at least 1 for measuring throughput, got {size}.")
    prompts = {name: _prompts(model, batch, prompt_tokens, seed) for name, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    training = {name: model.training for name, model in models.items()}
    try:
        for name, model in models.items():
            model.eval()
            _timed_run(model, prompts[name], min(WARM_UP_TOKENS, new_tokens))
        for _ in tqdm(range(repeats), desc="throughput", disable=not progress):
            for name, model in models.items():
                seconds[name].append(_timed_run(model, prompts[name], new_tokens))
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {
        name: {
            "engine": "transformers",
            "device": str(_device(model)),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "prefill_tokens_per_second": _spread([batch * prompt_tokens / prefill for prefill, _ in seconds[name]]),
            "decode_tokens_per_second": _spread([batch * new_tokens / decode for _, decode in seconds[name]]),
        }
        for name, model in models.items()
    }


@torch.inference_mode()
def _timed_run(model: nn.Module, ids: Int[Tensor, "batch length"], new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of ``new_tokens`` greedy steps after it."""
    # As in generate(): the prefill needs the logits of the last position only.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(ids.device)
    output = model(input_ids=ids, use_cache=True, **last_only)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    middle = _now(ids.device)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return middle - start, _now(ids.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _prompts(model: Any, batch: int, length: int, seed: int) -> Int[Tensor, "batch length"]:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _spread(rates: list[float]) -> dict[str, float | int]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)}
