"""Documents to rows: nothing is lost, nothing is cut that need not be, and documents stay told apart."""

import random

import pytest
import torch

from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.packing import best_fit, pack

DOCUMENTS = [[1] * 3, [2] * 6, [3] * 4, [4] * 1, [5] * 17]


def packed(packing, *, length=8) -> Rows:
    return pack("text", DOCUMENTS, length=length, packing=packing, padding=0)


def segments(rows: Rows) -> list[list[int]]:
    """The documents or pieces of every row, told apart by their positions alone, as a model tells them apart."""
    inputs = rows.inputs()
    found = []
    for ids, positions, mask in zip(inputs["input_ids"], inputs["position_ids"], rows.mask, strict=True):
        for token, position, text in zip(ids.tolist(), positions.tolist(), mask.tolist(), strict=True):
            if text and position == 0:
                found.append([])
            if text:
                found[-1].append(token)
    return found


def test_isolated_documents_are_whole_but_for_those_longer_than_a_row():
    assert sorted(segments(packed("isolate"))) == [[1] * 3, [2] * 6, [3] * 4, [4], [5], [5] * 8, [5] * 8]


def test_an_isolated_document_fills_the_row_that_it_fits_best():
    rows = packed("isolate")
    assert [row[mask].tolist() for row, mask in zip(rows.ids, rows.mask, strict=True)] == [
        [1, 1, 1, 3, 3, 3, 3, 4], [2, 2, 2, 2, 2, 2, 5], [5] * 8, [5] * 8,
    ]  # fmt: skip


def test_padding_is_a_document_of_its_own():
    """Else the padding after a text would continue it, and a mask of padding would hide that documents are apart."""
    rows = pack("text", [[7] * 3], length=5, packing="isolate", padding=0)
    assert rows.inputs()["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert rows.mask.tolist() == [[True] * 3 + [False] * 2]


def test_a_padded_row_is_the_beginning_of_one_document():
    rows = packed("pad")
    assert rows.mask.sum(dim=1).tolist() == [3, 6, 4, 1, 8]
    assert rows.ids[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert [tuple(batch.ids.shape) for batch in rows.batches(2)] == [(2, 6), (2, 4), (1, 8)]


def test_documents_end_to_end_fill_every_row_but_the_last():
    rows = packed("concat")
    assert rows.ids[rows.mask].tolist() == [token for document in DOCUMENTS for token in document]
    assert rows.mask.sum(dim=1).tolist() == [8, 8, 8, 7]
    assert rows.inputs().keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("packing", ["isolate", "pad", "concat"])
def test_rows_say_how_they_were_packed(packing):
    assert packed(packing).packing == packing


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_loses_nothing_and_opens_a_row_only_where_none_has_room(seed):
    draw = random.Random(seed)
    pieces = [[number] * draw.randint(1, 64) for number in range(200)]
    rows = best_fit(pieces, 64)
    assert sorted(piece for row in rows for piece in row) == pieces
    assert all(sum(map(len, row)) <= 64 for row in rows)
    used = [sum(map(len, row)) for row in rows]
    for at, row in enumerate(rows):
        assert all(earlier + len(row[0]) > 64 for earlier in used[:at])
    assert [row[0] for row in rows] == sorted(row[0] for row in rows), "rows begin in the order of the text"


def test_each_piece_goes_where_the_plain_search_for_the_fullest_row_puts_it():
    draw = random.Random(1)
    pieces = [[0] * draw.randint(1, 32) for _ in range(120)]
    expected: list[list[int]] = []
    for piece in pieces:
        fits = [row for row in expected if sum(row) + len(piece) <= 32]
        row = max(fits, key=lambda row: (sum(row), -expected.index(row)), default=None)
        if row is None:
            expected.append([len(piece)])
        else:
            row.append(len(piece))
    assert sorted(sorted(map(len, row)) for row in best_fit(pieces, 32)) == sorted(sorted(row) for row in expected)


def test_positions_of_an_isolated_row_of_many_documents():
    rows = pack("text", [[1], [2, 2], [3], [4, 4, 4]], length=7, packing="isolate", padding=0)
    assert rows.positions.tolist() == [[0, 0, 1, 0, 0, 1, 2]]
    assert torch.equal(rows.positions, rows.inputs()["position_ids"])
