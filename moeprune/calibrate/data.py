"""Calibration text as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.calibrate.rows import Rows as Rows
from moeprune.calibrate.text.cache import fingerprint, load_rows, save_rows
from moeprune.calibrate.text.documents import Document, read_documents
from moeprune.calibrate.text.packing import Packing, pack
from moeprune.checkpoint.load import long_texts
from moeprune.data_mix import mixes
from moeprune.data_spec import COMPRESSED, LOCAL_FORMATS, WILD, DataSpec, ending
from moeprune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 0.5
"""Share of unknown and padding tokens in a text above which the tokenizer is not taken to be one for it."""


def read_domain(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    tokens: int,
    seed: int,
    vocab_size: int,
    packing: Packing = "isolate",
    cache: bool = False,
) -> Rows:
    """Read, tokenise and pack one domain, or find it in the cache.

    Documents come in an order that the seed decides, the same on every rank, until the token budget is spent, there
    are as many as asked for, or the text ends.

    Args:
        spec: Where the text is.
        tokenizer: The model's tokenizer; its chat template is applied to chats.
        length: Tokens a row.
        tokens: Budget where the spec has none of its own.
        seed: Order of the documents.
        vocab_size: Rows of the model's embedding, against which token ids are checked.
        packing: How documents become rows.
        cache: Keep the rows, and use those that were kept.

    Raises:
        DataError: If the source, column or chat template is missing, there is no text, or ids do not fit the model.
    """
    if spec.tokens is None and spec.documents is None:
        spec = spec.model_copy(update={"tokens": tokens})
    options = {"length": length, "seed": seed, "vocab_size": vocab_size, "packing": packing}
    key = fingerprint(spec, tokenizer=tokenizer, options=options) if cache else None
    rows = None if key is None else load_rows(key, spec.name)
    if rows is None:
        rows = _read(spec, tokenizer=tokenizer, length=length, seed=seed, vocab_size=vocab_size, packing=packing)
        if key is not None:
            save_rows(rows, key)
    return rows


def _read(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    vocab_size: int,
    packing: Packing,
) -> Rows:
    end: list[int] = [] if tokenizer.eos_token_id is None else [int(str(tokenizer.eos_token_id))]
    documents: list[list[int]] = []
    left = spec.tokens
    padding = _Unknown(tokenizer)
    with long_texts(tokenizer):
        for document in read_documents(spec, tokenizer=tokenizer, seed=seed):
            padding.count(document)
            # A chat ends as its template ends it; where the next document follows unseparated, it ends twice.
            ids = document if (document.whole and packing != "concat") or document[-1:] == end else document + end
            ids = ids[:length] if packing == "pad" else ids
            documents.append(ids if left is None else ids[:left])
            if left is not None:
                left -= len(documents[-1])
                if left <= 0:
                    break
    if not documents:
        column = spec.ids or spec.text or spec.prompt or spec.column
        where = f" in {column!r}" if column else ""
        raise DataError(f"{spec.source}: there are no rows, or no text{where} in any of them{_passed_over(spec)}.")
    padding.check(spec)
    largest = max(max(ids) for ids in documents)
    if largest >= vocab_size:
        raise DataError(
            f"{spec.source}: the tokenizer gives id {largest}, the model has {vocab_size} embeddings. "
            "Tokenizer and model do not belong together."
        )
    return pack(spec.name, documents, length=length, packing=packing, padding=int(str(tokenizer.pad_token_id or 0)))


class _Unknown:
    """How much of a text the tokenizer knows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = (tokenizer.unk_token_id, tokenizer.pad_token_id)
        self._ids = {int(str(token)) for token in ids if token is not None}
        self._seen = self._total = 0

    def count(self, document: Document) -> None:
        self._total += len(document)
        self._seen += sum(token in self._ids for token in document) if self._ids else 0

    def check(self, spec: DataSpec) -> None:
        if self._seen > MOST_UNKNOWN * self._total:
            raise DataError(
                f"{spec.source}: {self._seen} of {self._total} tokens are unknown to the tokenizer or padding. "
                "It is not one for this text, or not the model's."
            )


def _passed_over(spec: DataSpec) -> str:
    rules = [f"where {spec.where}"] if spec.where else []
    rules += [f"of {spec.min_tokens} tokens or more"] if spec.min_tokens else []
    return f" ({', '.join(rules)})" if rules else ""


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
        check_source(spec)


def check_source(spec: DataSpec) -> None:
    """Refuse a source that can be seen to be missing, or to be a file of no known kind.

    Raises:
        DataError: What is wrong and what to write instead.
    """
    path = Path(spec.source)
    wild = not path.exists() and WILD.search(spec.source)
    if path.is_dir():
        return
    if spec.local_format is None and not path.exists() and not wild:
        if "/" not in spec.source and get_close_matches(spec.source, mixes(), n=1, cutoff=0.7):
            raise DataError(f"{spec.source}: no such mix. {did_you_mean(spec.source, mixes())}")
        if ending(path) in LOCAL_FORMATS or spec.source.startswith((".", "/", "~")):
            raise DataError(f"{spec.source}: no such file.")
        return
    if not spec.local_files:
        raise DataError(f"{spec.source}: no file has such a name.")
    if spec.local_format is None:
        more = "; a pattern must name files of one kind" if wild else ""
        raise DataError(
            f"{spec.source}: expected a file ending in {', '.join(LOCAL_FORMATS)}, or in one of these and "
            f"{', '.join(COMPRESSED)}{more}."
        )
    given = [name for name in ("subset", "files") if getattr(spec, name) is not None]
    given += ["split"] if spec.split != "train" else []
    if given:
        raise DataError(f"{spec.source}: {given[0]!r} is for data sets of the Hub and folders; a file has none.")
