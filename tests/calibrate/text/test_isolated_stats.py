"""Statistics of packed documents are those of the documents one by one, whatever way the model allows."""

import numpy as np
import pytest
import torch

from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.packing import pack
from tests.calibrate.reference import observe
from tests.models import build

DOCUMENTS = [list(range(5, 12)), list(range(40, 44)), list(range(20, 33)), [7, 50, 9]]


@pytest.mark.parametrize(
    ("family", "packing"),
    [
        ("qwen3_moe", "isolate"),
        ("deepseek_v3", "isolate"),
        ("mixtral", "isolate"),
        ("mixtral", "pad"),
        ("gpt_oss", "pad"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_count_as_if_each_was_alone(family, packing, batch_size):
    model = build(family)
    packed = observe(model, pack("text", DOCUMENTS, length=16, packing=packing, padding=2), batch_size=batch_size)
    alone = [
        observe(model, Rows("text", torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)))
        for ids in DOCUMENTS
    ]
    assert packed.tokens.tolist() == [27]
    np.testing.assert_array_equal(packed.experts["count"], sum(part.experts["count"] for part in alone))
    for name in ("gate_sum", "norm_sum", "gated_norm_sum"):
        np.testing.assert_allclose(packed.experts[name], sum(part.experts[name] for part in alone), rtol=2e-4)


def test_documents_end_to_end_count_otherwise():
    """The test above would not see a packing that does nothing."""
    model = build("qwen3_moe")
    isolated, joined = (
        observe(model, pack("text", DOCUMENTS, length=16, packing=packing, padding=2))
        for packing in ("isolate", "concat")
    )
    assert isolated.tokens.tolist() == joined.tokens.tolist()
    assert not np.allclose(isolated.experts["gated_norm_sum"], joined.experts["gated_norm_sum"], rtol=1e-2)
