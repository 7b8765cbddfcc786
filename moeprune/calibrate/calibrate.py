"""Calibrate: a model and text to statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeprune import __version__
from moeprune.anatomy.source import Source
from moeprune.calibrate.data import Rows, check_domains, read_domain
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.stats import Stats
from moeprune.data_spec import DataSpec, expand_demo
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
) -> list[Rows]:
    """Read and pack the text of every domain, before the model is loaded.

    Args:
        source: The model.
        tokenizer: Its tokenizer.
        data: The domains.
        tokens: Budget of each domain that has none of its own.
        length: Tokens a row; not more than the model's context.
        seed: Order of the documents.

    Raises:
        DataError: If a domain cannot be read, or rows are longer than the context.
    """
    data = expand_demo(data)
    check_domains(data)
    context = source.anatomy.context
    if context is not None and length > context:
        raise DataError(
            f"rows of {length} tokens are longer than the model's context of {context}. Give --length {context}."
        )
    vocab_size = source.anatomy.vocab_size
    return [
        read_domain(spec, tokenizer=tokenizer, length=length, tokens=tokens, seed=seed, vocab_size=vocab_size)
        for spec in data
    ]


def calibrate(
    source: Source,
    *,
    model: PreTrainedModel,
    rows: Sequence[Rows],
    batch_size: int = 8,
    seed: int = 0,
    quiet: bool = False,
) -> Stats:
    """Run the model over the text and collect its statistics.

    Args:
        source: The checkpoint that ``model`` was loaded from.
        model: The model in memory.
        rows: The text.
        batch_size: Rows a forward pass.
        seed: The seed that ordered the text, for the record.
        quiet: No progress bar.
    """
    run = {
        "moeprune": __version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "seed": seed,
        "length": rows[0].ids.shape[1],
        "tokens": {part.domain: part.num_tokens for part in rows},
    }
    return collect_stats(
        model, anatomy=source.anatomy, facts=source.facts, domains=rows, batch_size=batch_size, quiet=quiet, run=run
    )
