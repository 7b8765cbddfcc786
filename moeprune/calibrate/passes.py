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
from moeprune.errors import UnsupportedModelError
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
        UnsupportedModelError: If the model's experts cannot be observed.
    """
    begun = time.perf_counter()
    observer = Observer(
        model, experts=tuple(layer.experts for layer in anatomy.layers), num_experts=anatomy.num_experts.value
    )
    stats = Stats.zeros(facts, domains=[rows.domain for rows in domains], sums=observer.quantities)
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

    An encoder-decoder reads the first half of every row and is shown the second as what it should have written: the
    prefix language modelling of T5 (arXiv 1910.10683, section 3.2.1). Every token of text is seen once, by the half of
    the model whose turn it is.

    Args:
        model: The model.
        ids: Token ids, (batch, length).
        mask: True where a token is text, (batch, length).
        observer: Told which tokens count.

    Raises:
        UnsupportedModelError: If the model does not read text from its first token to its last.
    """
    if getattr(model.config, "canvas_length", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} denoises a canvas of random tokens; it does not read text from left to right, and "
            "statistics of a plain pass would be those of noise."
        )
    if model.config.is_encoder_decoder:
        _run_encoder_decoder(model, ids, mask, observer)
        return
    if observer is not None:
        observer.set_mask(mask)
    _reader(model)(input_ids=ids.to(_device(model)), attention_mask=_attention_mask(mask, model), use_cache=False)


def _run_encoder_decoder(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, observer: Observer | None
) -> None:
    half = ids.shape[1] // 2
    # As T5 has it: the decoder starts with the padding token, unless the config names another.
    named = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    start = next((token for token in named if token is not None), None)
    if start is None or half == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__}: an encoder-decoder is calibrated on rows of 2 tokens or more, with a "
            f"decoder_start_token_id in its config; got rows of {ids.shape[1]} and the id {start}."
        )
    # The decoder begins with a token that is not text: it is attended to, and not counted.
    begin = ids.new_full((len(ids), 1), start)
    source, target = mask[:, :half], mask[:, half:]
    if observer is not None:
        observer.set_mask(torch.cat([torch.zeros_like(mask[:, :1]), target], dim=1), encoder=source)
    model.base_model(
        input_ids=ids[:, :half].to(_device(model)),
        attention_mask=_attention_mask(source, model),
        decoder_input_ids=torch.cat([begin, ids[:, half:]], dim=1).to(_device(model)),
        decoder_attention_mask=_attention_mask(torch.cat([torch.ones_like(mask[:, :1]), target], dim=1), model),
        use_cache=False,
    )


def _attention_mask(mask: torch.Tensor, model: PreTrainedModel) -> torch.Tensor | None:
    """What the model takes: 1 for text, or nothing where all is text."""
    return None if bool(mask.all()) else mask.to(_device(model), torch.long)


def _reader(model: PreTrainedModel) -> Any:
    """The part of the model that reads text, without the head; some models hold several that are called one by one."""
    reader: Any = model.base_model
    while type(reader).forward is torch.nn.Module.forward:
        reader = next(iter(reader.children())).base_model  # Qwen3-Omni: the thinker, then the talker
    return reader


def _device(model: PreTrainedModel) -> torch.device:
    """Where inputs go; an offloaded model moves them itself from the CPU to where it runs."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
