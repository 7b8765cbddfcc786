"""Router rows that are no experts: they stay last, and an unknown one is not guessed at."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from moeprune.anatomy.axes import find_axes
from moeprune.anatomy.quirks.extra_rows import EXTRA_ROWS
from moeprune.anatomy.source import open_source
from moeprune.errors import UnsupportedModelError
from moeprune.export.export import export_checkpoint
from tests.pruning import random_plan
from tests.test_families import build

# (stored router, rows beyond the experts)
ROUTERS = {
    "zaya": ("model.layers.0.mlp.gate.router_mlp.out_proj.weight", 1),
    "inkling_text": ("model.layers.0.mlp.gate.weight", 1),
    "longcat_flash": ("model.layers.0.mlp.router.classifier.weight", 5),
}


@pytest.mark.parametrize("family", ROUTERS)
def test_the_rows_behind_the_experts_stay_behind_them(tmp_path, family):
    """Cut off, a model could no longer skip its experts, or would weigh its shared experts by another's row."""
    build(family).save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    plan = random_plan(source.facts, keep=7, top_k=source.anatomy.top_k.value)
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    key, extra = ROUTERS[family]
    before = load_file(tmp_path / "source" / "model.safetensors")[key]
    after = load_file(tmp_path / "out" / "model.safetensors")[key]
    assert (before.shape[0], after.shape[0]) == (12 + extra, 7 + extra)
    assert torch.equal(after[7:], before[12:])
    assert torch.equal(after[:7], before[list(plan.layers[0].keep)])


def test_zero_experts_that_are_stored_one_by_one_are_numbered_after_the_kept(tmp_path):
    build("longcat_flash").save_pretrained(tmp_path / "source")
    plan = random_plan(open_source(tmp_path / "source").facts, keep=7, top_k=3)
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    assert sorted(
        key for key in after if key.startswith("model.layers.0.mlp.experts.") and "gate_proj" in key
    ) == sorted(name.format(number) for number in range(7 + 5))
    assert all(torch.equal(after[name.format(7 + i)], before[name.format(12 + i)]) for i in range(5))


def test_rows_whose_meaning_is_unknown_are_not_cut_by_guess():
    with torch.device("meta"):
        before, after = {"gate.weight": torch.empty(9, 4)}, {"gate.weight": torch.empty(17, 4)}
    with pytest.raises(UnsupportedModelError, match=r"'gate\.weight' has 1 more entries than experts"):
        find_axes("brand_new", before, after, num_experts=8)
    assert "brand_new" not in EXTRA_ROWS
