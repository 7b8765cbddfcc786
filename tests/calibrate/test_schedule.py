"""The order of batches: that of the text, domains interleaved, the same for any number of ranks."""

import torch

from moeprune.calibrate.schedule import schedule
from tests.calibrate.reference import random_rows


def test_every_row_is_in_one_batch_and_domains_keep_their_order():
    domains = [random_rows("code", rows=7, padding=3), random_rows("math", rows=2, seed=1)]
    batches = schedule(domains, batch_size=3)
    for part in domains:
        mine = [batch for batch in batches if batch.domain == part.domain]
        assert [number for batch in mine for number in batch.numbers] == list(range(len(part)))
        assert torch.equal(torch.cat([batch.rows().ids for batch in mine]), part.ids)
        assert sum(batch.num_tokens for batch in mine) == part.num_tokens


def test_any_beginning_has_the_mix_of_the_whole():
    batches = schedule([random_rows("code", rows=30), random_rows("math", rows=10)], batch_size=1)
    for end in range(1, 41):
        code = sum(batch.domain == "code" for batch in batches[:end])
        assert abs(code - 0.75 * end) <= 1


def test_a_batch_is_not_wider_than_its_longest_row():
    rows = random_rows("chats", rows=4)
    rows.ragged = True
    rows.mask[:2, 5:] = False
    first, second = (batch.rows() for batch in schedule([rows], batch_size=2))
    assert first.ids.shape == (2, 5) and second.ids.shape == (2, 11)
