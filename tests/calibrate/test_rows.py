"""Rows of token ids: what a model is given of them."""

import torch

from moeprune.calibrate.rows import Rows


def rows(
    *, segments: list[list[int]] | None = None, lengths: tuple[int, ...] = (5, 5, 2), ragged: bool = False
) -> Rows:
    ids = torch.arange(15).view(3, 5)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return Rows("text", ids, mask, None if segments is None else torch.tensor(segments), ragged=ragged)


SEGMENTS = [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 2, 2]]


def test_full_rows_need_no_mask():
    inputs = rows().inputs(slice(0, 2))
    assert inputs.keys() == {"input_ids"}
    assert inputs["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_padding_is_masked():
    inputs = rows().inputs()
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]


def test_positions_begin_anew_in_every_document_and_in_the_padding():
    inputs = rows(segments=SEGMENTS).inputs()
    assert inputs.keys() == {"input_ids", "position_ids"}, "a mask would keep transformers from seeing the documents"
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def test_documents_as_one_long_row():
    inputs = rows(segments=SEGMENTS).inputs([2, 0], flatten=True)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14, 0, 1, 2, 3, 4]]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 0, 1, 0, 1, 2]]


def test_rows_are_picked_in_the_order_given():
    picked = rows(segments=SEGMENTS).select([2, 0])
    assert picked.ids[:, 0].tolist() == [10, 0]
    assert picked.segments.tolist() == [SEGMENTS[2], SEGMENTS[0]]
    assert picked.num_tokens == 7


def test_batches_together_are_the_rows():
    batches = list(rows(segments=SEGMENTS).batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.cat([batch.ids for batch in batches]).equal(rows().ids)
    assert [batch.ids[:, 0].tolist() for batch in rows().batches(1, rows=[2, 1])] == [[10], [5]]


def test_a_batch_of_ragged_rows_is_as_wide_as_its_longest():
    ragged = rows(lengths=(3, 4, 2), ragged=True)
    assert [tuple(batch.ids.shape) for batch in ragged.batches(2)] == [(2, 4), (1, 2)]
    assert sum(batch.num_tokens for batch in ragged.batches(2)) == 9
    assert [tuple(batch.ids.shape) for batch in rows().batches(2)] == [(2, 5), (1, 5)], "packed rows stay as they are"
