"""How far a pruned model's next-token distribution is from the original's."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from moeprune.errors import EvaluationError
from moeprune.evaluate.paired import ratio


def divergence(
    model: nn.Module,
    reference: nn.Module,
    *,
    rows: Int[Tensor, "rows length"],
    batch_size: int,
    progress: bool = False,
) -> dict[str, Any]:
    """Mean KL(reference || model) and how often both would say the same next token.

    KL(p || q) = sum over the vocabulary of p (log p - log q), in nats, at every position of every row, in float32. Both
    models see one batch at a time and logits are compared row by row, so memory does not grow with the number of rows.

    Args:
        model: The model to judge. Both models may be on different devices and of different dtypes.
        reference: The original.
        rows: Token ids, int64, all rows of the same length and without padding.
        batch_size: Rows in a forward pass.
        progress: Whether to show a progress bar.

    Returns:
        ``{"kl": {"value", "stderr", "n"}, "top1_agreement": {"value", "stderr", "n"}, "tokens": int}``: nats a token,
        and a fraction between 0 and 1. The standard errors are over rows (n of them), because the positions of one row
        are not independent; None for a single row.

    Raises:
        EvaluationError: No rows, two models with different vocabularies, or a model whose logits are not numbers.
    """
    if rows.ndim != 2 or rows.numel() == 0 or batch_size < 1:
        raise EvaluationError(
            f"Expected token ids of shape (rows, length) with at least one token and a batch size of at least 1, "
            f"got shape {tuple(rows.shape)} and batch size {batch_size}."
        )
    kl: list[float] = []
    agreement: list[float] = []
    was_training = model.training, reference.training
    model.eval()
    reference.eval()
    try:
        for batch in tqdm(rows.split(batch_size), desc="divergence", disable=not progress):
            for ours, theirs in zip(_logits(model, batch), _logits(reference, batch), strict=True):
                row_kl, row_agreement = _row(ours, theirs.to(ours.device))
                kl.append(row_kl)
                agreement.append(row_agreement)
    finally:
        model.train(was_training[0])
        reference.train(was_training[1])
    if any(math.isnan(value) for value in kl):
        raise EvaluationError(
            "The divergence is not a number: one of the models gives NaN logits. Run both in float32 to see which."
        )
    return {"kl": _over_rows(kl), "top1_agreement": _over_rows(agreement), "tokens": rows.numel()}


@torch.no_grad()
def _logits(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits


def _row(ours: Float[Tensor, "length vocab"], theirs: Float[Tensor, "length vocab"]) -> tuple[float, float]:
    """Mean KL and agreement over the positions of one row."""
    if ours.shape != theirs.shape:
        raise EvaluationError(
            f"The models have vocabularies of {ours.shape[-1]} and {theirs.shape[-1]} tokens. "
            "Their divergence is defined only for the same vocabulary."
        )
    log_q = torch.log_softmax(ours.float(), dim=-1)
    log_p = torch.log_softmax(theirs.float(), dim=-1)
    p = log_p.exp()
    # 0 where p is 0, even if q is 0 there too (a masked part of the vocabulary), where the formula gives NaN.
    kl = torch.where(log_p == -math.inf, 0.0, p * (log_p - log_q)).sum(-1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return float(kl.double().mean()), float(agreement.mean())


def _over_rows(values: list[float]) -> dict[str, float | int | None]:
    value, stderr = ratio(values)
    return {"value": value, "stderr": stderr, "n": len(values)}
