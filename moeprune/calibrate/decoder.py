"""Give text to the part of a model that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from moeprune.calibrate.observer import Observer
from moeprune.calibrate.rows import Rows
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_decoder(
    model: PreTrainedModel, rows: Rows, observer: Observer | None = None, *, numbers: Sequence[int] | None = None
) -> None:
    """One forward pass without the vocabulary logits, which no statistic needs.

    An encoder-decoder reads the first half of every row and is shown the second as what it should have written: the
    prefix language modelling of T5 (arXiv 1910.10683, section 3.2.1). Every token of text is seen once, by the half of
    the model whose turn it is.

    Args:
        model: The model.
        rows: The batch.
        observer: Told which tokens count.
        numbers: Number of each row of the batch, counted over its domain.

    Raises:
        UnsupportedModelError: If the model does not read text from its first token to its last.
    """
    if getattr(model.config, "canvas_length", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} denoises a canvas of random tokens; it does not read text from left to right, and "
            "statistics of a plain pass would be those of noise."
        )
    if model.config.is_encoder_decoder:
        _run_encoder_decoder(model, rows, observer, numbers)
        return
    if observer is not None:
        observer.set_mask(rows.mask, rows=numbers)
    flash = "flash" in (model.config._attn_implementation or "")
    inputs = {name: value.to(_device(model)) for name, value in rows.inputs(flatten=flash).items()}
    _reader(model)(**inputs, use_cache=False)


def _run_encoder_decoder(
    model: PreTrainedModel, rows: Rows, observer: Observer | None, numbers: Sequence[int] | None
) -> None:
    ids, mask = rows.ids, rows.mask
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
        observer.set_mask(torch.cat([torch.zeros_like(mask[:, :1]), target], dim=1), encoder=source, rows=numbers)
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
