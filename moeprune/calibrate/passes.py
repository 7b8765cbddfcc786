"""Run the model over calibration text and collect its statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from moeprune.anatomy.anatomy import Anatomy
from moeprune.calibrate.data import Rows
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.stats import Stats
from moeprune.facts import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collect_stats(
    model: PreTrainedModel,
    *,
    anatomy: Anatomy,
    facts: ModelFacts,
    domains: Sequence[Rows],
    batch_size: int = 8,
    quiet: bool = False,
    run: dict[str, Any] | None = None,
) -> Stats:
    """One forward pass over the text of every domain, observed.

    Args:
        model: The model in memory, in evaluation mode.
        anatomy: Where its experts are.
        facts: What the statistics say of the model.
        domains: The packed text.
        batch_size: Rows a forward pass.
        quiet: No progress bar.
        run: How the text was chosen, for the record.

    Raises:
        StatsError: If a statistic is not finite, naming layer and expert.
    """
    begun = time.perf_counter()
    stats = Stats.zeros(facts, domains=[rows.domain for rows in domains])
    observer = Observer(
        model, experts=tuple(layer.experts for layer in anatomy.layers), num_experts=anatomy.num_experts.value
    )
    total = sum(rows.num_tokens for rows in domains)
    with (
        torch.inference_mode(),
        observer.observing(),
        tqdm(total=total, unit="tok", unit_scale=True, desc="calibrate", disable=quiet) as bar,
    ):
        for rows in domains:
            observer.start()
            bar.set_postfix_str(rows.domain)
            for ids, mask in zip(rows.ids.split(batch_size), rows.mask.split(batch_size), strict=True):
                run_decoder(model, ids, mask, observer)
                bar.update(int(mask.sum()))
            observer.finish(stats, domain=rows.domain, tokens=rows.num_tokens)
    stats.runs = [{**(run or {}), "seconds": round(time.perf_counter() - begun, 2)}]
    stats.check("calibration")
    return stats


def run_decoder(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, observer: Observer | None) -> None:
    """One forward pass without the vocabulary logits, which no statistic needs.

    Args:
        model: The model.
        ids: Token ids, (batch, length).
        mask: True where a token is text, (batch, length).
        observer: Told which tokens count.
    """
    padded = not bool(mask.all())
    if observer is not None:
        observer.set_mask(mask)
    model.base_model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device, torch.long) if padded else None,
        use_cache=False,
    )
