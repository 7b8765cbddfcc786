"""REAP by llm-compressor, through its ``oneshot``; in an environment of its own."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from clock import answer, request, timed
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from safetensors.torch import load_file

SEQUENTIAL = {"pipeline": "sequential", "moe_calibrate_all_experts": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "basic": {"pipeline": "basic", "moe_calibrate_all_experts": False},
    "sequential": SEQUENTIAL,
    "sequential, causal": SEQUENTIAL,
    "sequential, unpruned inputs": SEQUENTIAL | {"propagate_error": False},
    "sequential, causal, unpruned inputs": SEQUENTIAL | {"propagate_error": False},
    "defaults": {},
}
"""``defaults`` are those of ``oneshot``: the sequential pipeline, every expert on every token, rows one by one. What is
different about that pipeline is undone one by one: ``causal`` leaves the model its own attention, which hides later
tokens (see ``causality.py``), ``unpruned inputs`` gives each layer what those before it wrote before they were pruned.
"""


def attention(what: str) -> AbstractContextManager[Any]:
    """Where ``causal`` is wanted, leave the model's attention as it is."""
    name = "llmcompressor.utils.helpers.use_eager_attention"
    return patch(name, lambda _: nullcontext()) if "causal" in what else nullcontext()


def main() -> None:
    """Load, warm up, time."""
    asked = request()
    torch.set_num_threads(1)
    ids = load_file(asked["ids"])["ids"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"])
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    settings = SETTINGS[asked["what"]]
    if settings:
        settings = {**settings, "batch_size": asked["batch_size"], "shuffle_calibration_samples": False}
    with torch.inference_mode():
        model.base_model(input_ids=ids[: asked["batch_size"]], use_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "kept.json"
        os.chdir(folder)  # it writes logs where it stands
        recipe = REAPPruningModifier(sparsity=1 - asked["keep"], ignore=[], report_path=str(report))
        with attention(asked["what"]):
            _, spent = timed(
                lambda: oneshot(
                    model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe, max_seq_length=ids.shape[1],
                    num_calibration_samples=len(ids), **settings,
                )
            )  # fmt: skip
        kept = json.loads(report.read_text())
        os.chdir("/")
    by_layer = sorted(kept, key=lambda name: int(next(part for part in name.split(".") if part.isdigit())))
    answer(
        versions={"llmcompressor": __version__, "transformers": transformers.__version__},
        kept=[sorted(kept[name]) for name in by_layer], **spent,
    )  # fmt: skip


if __name__ == "__main__":
    main()
