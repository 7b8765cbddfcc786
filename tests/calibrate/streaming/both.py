"""The same text through a whole model and through a streamed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moeprune.anatomy.source import Source
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.stats import Stats

VOCAB = 77  # every family of the tests has more


def text(*, padded: bool = True, length: int = 21) -> list[Rows]:
    """Two domains of five and two rows, one of them with padding at the ends of two rows of different batches."""
    ids = torch.randint(VOCAB, (7, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(5, length, dtype=torch.bool)
    if padded:
        mask[1, length - 6 :] = False
        mask[4, 3:] = False
    return [Rows("code", ids[:5], mask), Rows("math", ids[5:], torch.ones(2, length, dtype=torch.bool))]


def whole_stats(source: Source, model: PreTrainedModel, rows: Sequence[Rows], **options: Any) -> Stats:
    """The statistics of a model that is in memory."""
    return collect_stats(
        model, anatomy=source.anatomy, facts=source.facts, domains=rows, batch_size=2, quiet=True, **options
    )


def assert_equal_stats(streamed: Stats, whole: Stats, *, rtol: float = 1e-10) -> None:
    """The same quantities; counts and tokens exactly, the rest up to the rounding of sums."""
    found, expected = dict(streamed.arrays()), dict(whole.arrays())
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if name.endswith(("count", "tokens", "coactivation")):
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            atol = rtol * max(1e-30, float(np.abs(array).max(initial=0)))
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=atol, err_msg=name)
