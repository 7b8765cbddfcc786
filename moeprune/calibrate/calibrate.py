"""Calibrate: a model and text to statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeprune import __version__
from moeprune.anatomy.source import Source
from moeprune.calibrate.data import Rows, check_domains, read_domain
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.text.isolation import check_apart, choose_packing
from moeprune.calibrate.text.packing import Packing
from moeprune.checkpoint.classes import transformers_config
from moeprune.data_mix import expand_data
from moeprune.data_spec import DataSpec
from moeprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_calibration(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[DataSpec],
    tokens: int,
    length: int,
    seed: int,
    packing: str = "auto",
    cache: bool = False,
) -> list[Rows]:
    """Read and pack the text of every domain, before the model is loaded.

    Args:
        source: The model.
        tokenizer: Its tokenizer.
        data: The domains.
        tokens: Budget of each domain that has none of its own.
        length: Tokens a row; not more than the model's context.
        seed: Order of the documents.
        packing: How documents become rows, one of :data:`moeprune.calibrate.text.packing.PACKINGS`.
        cache: Keep the rows, and use those that were kept.

    Raises:
        DataError: If a domain cannot be read, rows are longer than the context, or the model cannot keep documents of
            a row apart and was asked to.
    """
    data = expand_data(data, tokens=tokens)
    check_domains(data)
    chosen = choose_rows(source, length=length, packing=packing)
    return [
        read_domain(
            spec, tokenizer=tokenizer, length=length, tokens=tokens, seed=seed, vocab_size=source.anatomy.vocab_size,
            packing=chosen, cache=cache,
        )
        for spec in data
    ]  # fmt: skip


def choose_rows(source: Source, *, length: int, packing: str) -> Packing:
    """How documents become rows of a length that a model can read.

    Raises:
        DataError: If rows are longer than the context, or the model cannot do what was asked.
    """
    context = source.anatomy.context
    if context is not None and length > context:
        raise DataError(
            f"rows of {length} tokens are longer than the model's context of {context}. Give --length {context}."
        )
    return choose_packing(packing, config=transformers_config(source.path))


def calibrate(
    source: Source,
    *,
    model: PreTrainedModel,
    rows: Sequence[Rows],
    batch_size: int = 8,
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> Stats:
    """Run the model over the text and collect its statistics.

    Args:
        source: The checkpoint that ``model`` was loaded from.
        model: The model in memory.
        rows: The text.
        batch_size: Rows a forward pass.
        seed: The seed that ordered the text, for the record.
        quiet: No progress bar.
        options: Further arguments of :func:`moeprune.calibrate.passes.collect_stats`.

    Raises:
        UnsupportedModelError: If the experts cannot be observed, or the model mixes documents that rows keep apart.
    """
    if any(part.segments is not None for part in rows):
        check_apart(model)
    run = record(rows, seed=seed, dtype=str(model.dtype).removeprefix("torch."), device=model.device.type)
    return collect_stats(
        model, anatomy=source.anatomy, facts=source.facts, domains=rows, batch_size=batch_size, quiet=quiet, run=run,
        **options,
    )  # fmt: skip


def record(rows: Sequence[Rows], *, seed: int, dtype: str, device: str) -> dict[str, Any]:
    """What statistics say of how they were made."""
    return {
        "moeprune": __version__,
        "dtype": dtype,
        "device": device.partition(":")[0],
        "seed": seed,
        "length": rows[0].ids.shape[1],
        "tokens": {part.domain: part.num_tokens for part in rows},
        "text": {part.domain: part.sha256() for part in rows},
    }
