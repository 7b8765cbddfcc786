"""Rows of data, shuffled, from local files and from data sets of the Hub, without loading either as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moeprune.data_spec import DataSpec
from moeprune.errors import DataError, did_you_mean

SHUFFLE_BUFFER, SMALLEST_BUFFER = 10_000, 1_000
"""Rows among which a stream is shuffled: these are read before the first is used, or fewer where few are asked for."""

Row = dict[str, Any]


def shuffled_rows(spec: DataSpec, *, seed: int) -> Iterator[Row]:
    """The rows of a data set in an order that the seed alone decides.

    A .jsonl file is shuffled as a whole by the places of its lines. Everything else is a stream, shuffled among
    :data:`SHUFFLE_BUFFER` rows (and by its files); it is read no further than the caller asks.

    Args:
        spec: Where the data is; rows without the values of its ``where`` are passed over.
        seed: Order.

    Raises:
        DataError: If it cannot be opened or read, or has no column that ``where`` names.
    """
    rows = _lines(Path(spec.source), seed) if is_json_lines(spec) else _stream(spec, seed)
    if spec.where is None:
        yield from rows
        return
    for row in rows:
        missing = spec.where.keys() - row.keys()
        if missing:
            raise DataError(f"{spec.source}: no column {min(missing)!r} (where). {did_you_mean(min(missing), row)}")
        if all(row[name] in allowed for name, allowed in spec.where.items()):
            yield row


def is_json_lines(spec: DataSpec) -> bool:
    """Whether the source is a local file of JSON lines."""
    return spec.local_format is not None and Path(spec.source).suffix.lower() == ".jsonl"


def _lines(path: Path, seed: int) -> Iterator[Row]:
    with path.open("rb") as file:
        lengths = np.fromiter((len(line) for line in file), dtype=np.int64)
        begins = np.cumsum(lengths) - lengths
        found = False
        for at in np.random.default_rng(seed).permutation(len(lengths)).tolist():
            file.seek(int(begins[at]))
            line = file.read(int(lengths[at]))
            if line.strip():
                found = True
                yield _parsed(line, path, at + 1)
    if not found:
        raise DataError(f"{path}: an empty file.")


def _parsed(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line.decode("utf-8").strip())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: cannot be read as JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object such as {{"text": "..."}}, got {line[:60]!r}.')
    return row


def _stream(spec: DataSpec, seed: int) -> Iterator[Row]:
    from datasets.exceptions import DatasetGenerationError

    if spec.local_format is not None:
        with Path(spec.source).open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(f"{spec.source}: an empty file.")
    dataset = _dataset(spec)
    buffer = min(SHUFFLE_BUFFER, max(SMALLEST_BUFFER, 4 * (spec.documents or SHUFFLE_BUFFER)))
    try:
        # A stream is parsed as it is read: broken JSON and bytes that are not UTF-8 show up here.
        yield from dataset.shuffle(seed=seed, buffer_size=buffer)
    except (DatasetGenerationError, ConnectionError, ValueError) as error:
        raise DataError(f"{spec.source}: cannot be read as {spec.local_format or 'a data set'}: {error}") from error


def _dataset(spec: DataSpec) -> Any:
    from datasets import load_dataset

    kind = spec.local_format
    with opening(spec):
        if kind is not None:
            options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
            return load_dataset(kind, data_files=spec.source, split="train", streaming=True, **options)
        return load_dataset(spec.source, spec.subset, data_files=spec.files, split=spec.split, streaming=True)


@contextmanager
def opening(spec: DataSpec) -> Iterator[None]:
    """Say in moeprune's words what `datasets` does not find or cannot open inside the block.

    Raises:
        DataError: In its place.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        yield
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{spec.source}: neither a local file nor a data set that could be opened "
            f"(subset {spec.subset!r}, split {spec.split!r}): {error}{_mixes(spec)}"
        ) from error


def _mixes(spec: DataSpec) -> str:
    """The end of the message for a name that may have been meant as that of a mix."""
    from moeprune.data_mix import mixes

    return "" if "/" in spec.source else f". Mixes that ship with moeprune: {did_you_mean(spec.source, mixes())}"
