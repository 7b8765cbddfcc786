"""Expert ids as values: shapes that do not change, and a table that must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moeprune.anatomy.quirks.expert_ids import remap_expert_ids
from moeprune.anatomy.source import open_source
from moeprune.errors import UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from tests.pruning import edit_tensors, random_plan
from tests.test_families import build

TABLE = "model.layers.0.ffn.gate.tid2eid"


@st.composite
def tables(draw: st.DrawFn):
    experts = draw(st.integers(2, 12))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    table = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    keep = tuple(sorted(draw(st.sets(st.integers(0, experts - 1), min_size=1))))
    return table, keep, experts, draw(st.integers(1, min(top_k, len(keep))))


@given(tables())
def test_every_token_gets_different_experts_that_exist(drawn):
    table, keep, experts, top_k = drawn
    new = remap_expert_ids(table, keep=keep, num_experts=experts, top_k=top_k)
    assert new.shape == (len(table), top_k)
    assert new.dtype == table.dtype
    assert new.min() >= 0
    assert new.max() < len(keep)
    assert all(len(set(row)) == top_k for row in new.tolist())


@given(tables())
def test_a_token_keeps_its_own_experts_first_and_in_order(drawn):
    table, keep, experts, top_k = drawn
    new = remap_expert_ids(table, keep=keep, num_experts=experts, top_k=top_k)
    for before, after in zip(table.tolist(), new.tolist(), strict=True):
        own = [keep.index(expert) for expert in before if expert in keep][:top_k]
        assert after[: len(own)] == own


def test_the_places_of_pruned_experts_are_shared_out_evenly():
    table = np.zeros((600, 1), dtype=np.int64)  # every token used expert 0, which goes
    new = remap_expert_ids(table, keep=(1, 2, 3), num_experts=4, top_k=1)
    assert np.bincount(new.reshape(-1)).tolist() == [200, 200, 200]


def test_ids_beyond_the_experts_are_refused():
    with pytest.raises(UnsupportedModelError, match="values from 0 to 7, the model has 7 experts"):
        remap_expert_ids(np.array([[0, 7]]), keep=(0, 1), num_experts=7, top_k=1)


def test_a_pruned_table_names_no_expert_that_is_gone(tmp_path):
    """With the old table the checkpoint would load without a remark and index past its experts."""
    build("deepseek_v4").save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    plan = random_plan(source.facts, keep=5, top_k=2)
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    before = load_file(tmp_path / "source" / "model.safetensors")[TABLE]
    after = load_file(tmp_path / "out" / "model.safetensors")[TABLE]
    assert before.max() >= 5, "the danger is there"
    assert (after.shape, after.dtype, int(after.max())) == ((97, 2), torch.int64, 4)
    keep = plan.layers[0].keep
    for token in range(97):
        survivors = [keep.index(expert) for expert in before[token].tolist() if expert in keep][:2]
        assert after[token, : len(survivors)].tolist() == survivors
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", plan=plan, against=tmp_path / "source"))


def test_a_table_that_is_left_as_it_was_does_not_pass_verification(tmp_path):
    build("deepseek_v4").save_pretrained(tmp_path / "source")
    plan = random_plan(open_source(tmp_path / "source").facts, keep=11, top_k=3)
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    old = load_file(tmp_path / "source" / "model.safetensors")[TABLE].clamp(max=10)
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({TABLE: old}))
    checks = verify_checkpoint(tmp_path / "out", plan=plan, against=tmp_path / "source", quiet=True)
    assert [check.name for check in checks if not check.passed] == ["every tensor byte for byte"]
