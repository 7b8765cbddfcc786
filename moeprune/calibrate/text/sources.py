"""Rows of data, shuffled, from local files and from data sets of the Hub, without loading either as a whole."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from moeprune.data_spec import LOCAL_FORMATS, DataSpec, ending
from moeprune.errors import DataError, did_you_mean

SHUFFLE_BUFFER, SMALLEST_BUFFER = 10_000, 1_000
"""Rows among which a stream is shuffled: these are read before the first is used, or fewer where few are asked for."""

Row = dict[str, Any]


def shuffled_rows(spec: DataSpec, *, seed: int) -> Iterator[Row]:
    """The rows of a data set in an order that the seed alone decides.

    A .jsonl file is shuffled as a whole by the places of its lines, a .json file is read as a whole. Everything else is
    a stream, shuffled among :data:`SHUFFLE_BUFFER` rows (and by its files); it is read no further than the caller asks.

    Args:
        spec: Where the data is; rows without the values of its ``where`` are passed over.
        seed: Order.

    Raises:
        DataError: If it cannot be opened or read, or has no column that ``where`` names.
    """
    if is_json_lines(spec):
        rows = _lines(spec.local_files, seed)
    elif spec.local_format == "json" and all(ending(path) == ".json" for path in spec.local_files):
        rows = _listed(spec.local_files, seed)
    else:
        rows = _stream(spec, seed)
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
    """Whether the source are local files of JSON lines, not compressed."""
    return spec.local_format is not None and all(path.suffix.lower() == ".jsonl" for path in spec.local_files)


def _lines(paths: Sequence[Path], seed: int) -> Iterator[Row]:
    lengths = [_line_lengths(path) for path in paths]
    begins = [np.cumsum(each) - each for each in lengths]
    before = np.cumsum([0, *map(len, lengths)])
    found = False
    for at in np.random.default_rng(seed).permutation(before[-1]).tolist():
        number = int(np.searchsorted(before, at, side="right")) - 1
        line = at - int(before[number])
        with paths[number].open("rb") as file:  # one at a time: a pattern may name thousands
            file.seek(int(begins[number][line]))
            text = file.read(int(lengths[number][line]))
        text = text.removeprefix(codecs.BOM_UTF8) if line == 0 else text
        if text.strip():
            found = True
            yield _parsed(text, paths[number], line + 1)
    if not found:
        raise DataError(f"{paths[0]}: an empty file.")


def _line_lengths(path: Path) -> Int64[np.ndarray, " lines"]:
    with path.open("rb") as file:
        return np.fromiter((len(line) for line in file), dtype=np.int64)


def _listed(paths: Sequence[Path], seed: int) -> Iterator[Row]:
    """Rows of files that hold a JSON list each.

    Not read by `datasets`, whose stream (5.2) gives values of a column with several types as JSON text, quoted.
    """
    rows = [row for path in paths for row in _list_of(path)]
    for at in np.random.default_rng(seed).permutation(len(rows)).tolist():
        yield rows[at]


def _list_of(path: Path) -> list[Row]:
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            text = file.read().decode("utf-8-sig").strip()
        if not text:
            raise DataError(f"{path}: an empty file.")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in _objects(text)]
    except (ValueError, RecursionError, OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as JSON: {error}.") from error
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects such as {{"text": "..."}}.')
    return rows


def _objects(text: str) -> list[str]:
    """One object over several lines, or one a line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.splitlines() if error.msg == "Extra data" else [text]
    return [text]


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

    if spec.local_format is not None and not any(_holds_something(path) for path in spec.local_files):
        raise DataError(f"{spec.source}: an empty file.")
    dataset = _dataset(spec)
    buffer = min(SHUFFLE_BUFFER, max(SMALLEST_BUFFER, 4 * (spec.documents or SHUFFLE_BUFFER)))
    try:
        # A stream is parsed as it is read: broken JSON and bytes that are not UTF-8 show up here.
        yield from dataset.shuffle(seed=seed, buffer_size=buffer)
    except (DatasetGenerationError, ConnectionError, ValueError) as error:
        raise DataError(f"{spec.source}: cannot be read as {spec.local_format or 'a data set'}: {error}") from error


def _holds_something(path: Path) -> bool:
    if ending(path) != path.suffix.lower():
        return True  # compressed: what is in it shows when it is read
    with path.open("rb") as file:
        return any(line.strip() for line in file)


def _dataset(spec: DataSpec) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    kind = spec.local_format
    # A file of text is one document, not one for each line.
    options: dict[str, Any] = {"sample_by": "document"} if _is_text(spec) else {}
    options |= {"sep": "\t"} if kind == "csv" and ending(spec.local_files[0]) == ".tsv" else {}
    with opening(spec):
        if kind is not None:
            return load_dataset(
                kind, data_files=[*map(str, spec.local_files)], split="train", streaming=True, **options
            )
        if (Path(spec.source) / "dataset_info.json").is_file() or (Path(spec.source) / "dataset_dict.json").is_file():
            saved = load_from_disk(spec.source)
            return (saved if isinstance(saved, Dataset) else saved[spec.split]).to_iterable_dataset()
        return load_dataset(
            spec.source, spec.subset, data_files=spec.files, split=spec.split, streaming=True, **options
        )  # fmt: skip


def _is_text(spec: DataSpec) -> bool:
    kinds = {LOCAL_FORMATS.get(ending(path)) for path in spec.local_files if ending(path) != ".md"}
    return spec.local_format == "text" or (Path(spec.source).is_dir() and kinds - {None} == {"text"})


@contextmanager
def opening(spec: DataSpec) -> Iterator[None]:
    """Say in moeprune's words what `datasets` does not find or cannot open inside the block.

    Raises:
        DataError: In its place.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        yield
    except StopIteration as error:  # of `datasets`, for a compressed file that holds nothing
        raise DataError(f"{spec.source}: an empty file.") from error
    except (
        DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError, KeyError,
    ) as error:  # fmt: skip
        if Path(spec.source).exists():
            kind = spec.local_format or f"a data set (subset {spec.subset!r}, split {spec.split!r})"
            what = f"cannot be read as {kind}: {error}"
        else:
            what = (
                f"neither a local file nor a data set that could be opened (subset {spec.subset!r}, split "
                f"{spec.split!r}): {error}{_mixes(spec)}"
            )
        raise DataError(f"{spec.source}: {what}") from error


def _mixes(spec: DataSpec) -> str:
    """The end of the message for a name that may have been meant as that of a mix."""
    from moeprune.data_mix import mixes

    return "" if "/" in spec.source else f". Mixes that ship with moeprune: {did_you_mean(spec.source, mixes())}"
