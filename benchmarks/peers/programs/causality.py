"""Does llm-compressor's calibration let tokens see those that follow them? In llm-compressor's environment.

Two rows begin alike and end differently. In a causal model the beginnings cannot differ anywhere, whatever the ends
are, so what the first layer's MoE block is given for them is compared; no reference implementation is needed. Then the
same is asked of rows that end in padding, whose attention mask is not all ones.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

import torch
import transformers
from clock import answer, request
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from safetensors.torch import load_file

PADDING = 8


def pair_of_rows(ids: torch.Tensor, *, padded: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows with the first half in common, and their masks; (2, length) each."""
    half = ids.shape[1] // 2
    rows = ids[:2].clone()
    rows[1, :half] = rows[0, :half]
    mask = torch.ones_like(rows)
    if padded:
        rows[:, -PADDING:] = pad
        mask[:, -PADDING:] = 0
    return rows, mask


def largest_difference(seen: torch.Tensor) -> float:
    """Of the first halves of two rows, (2, length, hidden)."""
    half = seen.shape[1] // 2
    return float((seen[0, :half] - seen[1, :half]).abs().max())


def seen_by_block(asked: dict[str, Any], rows: torch.Tensor, mask: torch.Tensor, pipeline: str | None) -> torch.Tensor:
    """What the MoE block of the first layer is given for two rows; by a plain forward pass without ``pipeline``."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    if pipeline is None:
        with torch.inference_mode():
            for row, of_row in zip(rows, mask, strict=True):
                model(input_ids=row[None], attention_mask=of_row[None])
    else:
        dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": mask.tolist()})
        recipe = REAPPruningModifier(sparsity=1 - asked["keep"], ignore=[])
        tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"])
        oneshot(
            model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe, max_seq_length=rows.shape[1],
            num_calibration_samples=2, shuffle_calibration_samples=False, pipeline=pipeline,
            moe_calibrate_all_experts=False,
        )  # fmt: skip
    return torch.cat(seen[:2])  # a sequential pipeline runs the layer once more, after pruning it


def without_eager(asked: dict[str, Any], rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sequential pipeline with the model's own attention instead of the eager one that it puts in its place."""
    with patch("llmcompressor.utils.helpers.use_eager_attention", lambda _: contextlib.nullcontext()):
        return seen_by_block(asked, rows, mask, "sequential")


def main() -> None:
    """Compare plain passes and both pipelines."""
    asked = request()
    torch.set_num_threads(1)
    ids = load_file(asked["ids"])["ids"]
    pad = transformers.AutoConfig.from_pretrained(asked["model"]).pad_token_id
    found: dict[str, dict[str, float]] = {}
    for name, padded in (("rows without padding", False), ("rows that end in padding", True)):
        rows, mask = pair_of_rows(ids, padded=padded, pad=pad)
        by_pass = {
            "plain forward": seen_by_block(asked, rows, mask, None),
            "basic": seen_by_block(asked, rows, mask, "basic"),
            "sequential": seen_by_block(asked, rows, mask, "sequential"),
            "sequential, attention left as it is": without_eager(asked, rows, mask),
        }
        found[name] = {what: largest_difference(seen) for what, seen in by_pass.items()}
    answer(
        versions={"llmcompressor": __version__, "transformers": transformers.__version__},
        scale=float(by_pass["plain forward"].std()), difference=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
