"""Calibration text as packed rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune.calibrate.rows import Rows as Rows
from moeprune.checkpoint.load import long_texts
from moeprune.data_spec import LOCAL_FORMATS, DataSpec
from moeprune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMNS = ("text", "content", "messages", "conversations", "prompt")
SHUFFLE_BUFFER = 10_000


def read_domain(
    spec: DataSpec, *, tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, seed: int, vocab_size: int
) -> Rows:
    """Read, tokenise and pack one domain.

    Documents are shuffled, joined with the tokenizer's end-of-text token and cut into rows of equal length, until the
    token budget is spent or the text ends.

    Args:
        spec: Where the text is.
        tokenizer: The model's tokenizer; its chat template is applied to rows of messages.
        length: Tokens a row.
        tokens: Budget where the spec has none of its own.
        seed: Order of the documents.
        vocab_size: Rows of the model's embedding, against which token ids are checked.

    Raises:
        DataError: If the source, column or chat template is missing, there is no text, or ids do not fit the model.
    """
    budget = spec.tokens or tokens
    flat: list[int] = []
    with long_texts(tokenizer):
        for document in _documents(spec, tokenizer, seed):
            flat.extend(document)
            if len(flat) >= budget:
                break
    flat = flat[:budget]
    if not flat:
        raise DataError(f"{spec.source}: no text in column {spec.column or '(default)'!r}, split {spec.split!r}.")
    if max(flat) >= vocab_size:
        raise DataError(
            f"{spec.source}: the tokenizer gives id {max(flat)}, the model has {vocab_size} embeddings. "
            "Tokenizer and model do not belong together."
        )
    padding = -len(flat) % length
    ids = torch.tensor(flat + [tokenizer.pad_token_id or 0] * padding).view(-1, length)
    mask = torch.ones(ids.numel(), dtype=torch.bool)
    mask[len(flat) :] = False
    return Rows(spec.name, ids, mask.view_as(ids))


def check_domains(specs: Sequence[DataSpec]) -> None:
    """Refuse an empty list and two domains of one name, and sources that can be seen to be missing.

    Raises:
        DataError: What is wrong and what to write instead.
    """
    if not specs:
        raise DataError(
            "no calibration data. Give at least one --data DOMAIN=FILE (jsonl, json, parquet, txt) or Hub id."
        )
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two data sets are named {name!r}. Give them names: --data NAME=SOURCE.")
    for spec in specs:
        path = Path(spec.source)
        if path.is_dir() or (path.is_file() and spec.local_format is None):
            raise DataError(f"{spec.source}: expected a file ending in {', '.join(LOCAL_FORMATS)}.")
        if not path.exists() and (path.suffix.lower() in LOCAL_FORMATS or spec.source.startswith((".", "/", "~"))):
            raise DataError(f"{spec.source}: no such file.")


def _documents(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    end: list[int] = [] if tokenizer.eos_token_id is None else [int(str(tokenizer.eos_token_id))]
    column = spec.column
    for row in _shuffled(spec, seed):
        column = column or next((name for name in TEXT_COLUMNS if name in row), None)
        if column is None or column not in row:
            wanted = repr(column) if column else f"any of {', '.join(TEXT_COLUMNS)}"
            hint = did_you_mean(column or "", row)
            raise DataError(f"{spec.source}: no column {wanted}. {hint} Choose one with --column.")
        ids = _tokenise(row[column], spec, column, tokenizer)
        if ids:
            yield ids + end


def _shuffled(spec: DataSpec, seed: int) -> Iterator[dict[str, Any]]:
    from datasets.exceptions import DatasetGenerationError

    if spec.local_format is not None:
        with Path(spec.source).open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(f"{spec.source}: an empty file.")
    dataset = _dataset(spec)
    try:
        # A stream is parsed as it is read: broken JSON and bytes that are not UTF-8 show up here.
        yield from dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except (DatasetGenerationError, ConnectionError, ValueError) as error:
        raise DataError(f"{spec.source}: cannot be read as {spec.local_format or 'a data set'}: {error}") from error


def _dataset(spec: DataSpec) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    kind = spec.local_format
    try:
        if kind is not None:
            options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
            return load_dataset(kind, data_files=spec.source, split="train", streaming=True, **options)
        return load_dataset(spec.source, spec.subset, split=spec.split, streaming=True)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{spec.source}: neither a local file nor a data set that could be opened "
            f"(subset {spec.subset!r}, split {spec.split!r}): {error}"
        ) from error


def _tokenise(value: Any, spec: DataSpec, column: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    encode: Any = tokenizer  # its annotations allow far more than what is given here
    if isinstance(value, str):
        return encode(value, truncation=False)["input_ids"] if value.strip() else []
    if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "content"} <= value[0].keys():
        if tokenizer.chat_template is None:
            raise DataError(
                f"{spec.source}: column {column!r} holds chat messages, but the tokenizer has no chat template. "
                "Choose a column of plain text with --column."
            )
        text = tokenizer.apply_chat_template(value, tokenize=False)
        return encode(text, add_special_tokens=False, truncation=False)["input_ids"]
    raise DataError(
        f"{spec.source}: column {column!r} holds {type(value).__name__}, expected text or messages "
        "([{'role': ..., 'content': ...}]). Choose another with --column."
    )
