"""Documents as rows of equal length, in three ways."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moeprune.calibrate.rows import Rows

Packing = Literal["isolate", "pad", "concat"]
PACKINGS: dict[str, str] = {
    "auto": "isolate, or pad where a model cannot keep documents apart",
    "isolate": "several documents a row, none of which sees another; cut only where longer than a row",
    "pad": "one document a row, cut to the row's length",
    "concat": "documents end to end, cut into rows; a token sees all before it in its row",
}


def pack(domain: str, documents: Sequence[Sequence[int]], *, length: int, packing: Packing, padding: int) -> Rows:
    """Rows of a domain.

    Args:
        domain: Its name.
        documents: Token ids; at least one, none of them empty.
        length: Tokens a row.
        packing: See :data:`PACKINGS`.
        padding: Id that fills rows up.
    """
    if packing == "concat":
        flat = [token for document in documents for token in document]
        rows = [[flat[at : at + length]] for at in range(0, len(flat), length)]
    elif packing == "pad":
        rows = [[document[:length]] for document in documents]
    else:
        rows = best_fit(_pieces(documents, length), length)
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    segments = torch.zeros(len(rows), length, dtype=torch.int32)
    for at, row in enumerate(rows):
        _fill(row, ids[at], mask[at], segments[at])
    return Rows(domain, ids, mask, segments if packing == "isolate" else None, ragged=packing == "pad")


def _fill(row: Sequence[Sequence[int]], ids: Tensor, mask: Tensor, segments: Tensor) -> None:
    begin = 0
    for number, document in enumerate(row):
        end = begin + len(document)
        ids[begin:end] = torch.tensor(document)
        segments[begin:end] = number
        begin = end
    mask[:begin] = True
    segments[begin:] = len(row)


def _pieces(documents: Iterable[Sequence[int]], length: int) -> list[Sequence[int]]:
    return [document[at : at + length] for document in documents for at in range(0, len(document), length)]


def best_fit(pieces: Iterable[Sequence[int]], length: int) -> list[list[Sequence[int]]]:
    """Put each piece into the row that it fills best, in a new one if it fits nowhere.

    Best-fit packing (arXiv 2404.10830) without the sorting: rows stay in the order of the text, so that a part of
    them is a part of the text. No piece is cut.

    Args:
        pieces: Each of at most ``length`` tokens.
        length: Tokens a row.
    """
    rows: list[list[Sequence[int]]] = []
    free: list[tuple[int, int]] = []  # space that is left in a row, and its number; ascending
    for piece in pieces:
        at = bisect.bisect_left(free, (len(piece), -1))
        if at == len(free):
            space, row = length, len(rows)
            rows.append([])
        else:
            space, row = free.pop(at)
        rows[row].append(piece)
        if space > len(piece):
            bisect.insort(free, (space - len(piece), row))
    return rows
