"""ERNIE-VL keeps the experts of its text and vision towers in one list."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from moeprune.anatomy.source import open_source
from moeprune.export.export import export_checkpoint
from tests.pruning import random_plan
from tests.test_families import build

BLOCK = "model.layers.1.mlp."
TEXT, VISION = (f"model.language_model.layers.1.mlp.{tower}" for tower in ("text_moe", "vision_moe"))


def test_a_pruned_list_is_gapless_with_the_vision_experts_behind_the_text_experts(tmp_path):
    """The loader cuts the list in the middle: with gaps or by other numbers, text would be routed to vision experts."""
    build("ernie4_5_vl_moe").save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    plan = random_plan(source.facts, keep=7, top_k=2)
    assert plan.keep[TEXT] != plan.keep[VISION]
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    expected = [*plan.keep[TEXT], *(12 + expert for expert in plan.keep[VISION])]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        for new, old in enumerate(expected):
            name = BLOCK + "experts.{}." + f"{projection}.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
        assert name.format(14) not in after
    # One bias for both towers, one row each; two routers, stored as (hidden, experts).
    bias = BLOCK + "moe_statics.e_score_correction_bias"
    rows = [before[bias][0, list(plan.keep[TEXT])], before[bias][1, list(plan.keep[VISION])]]
    assert torch.equal(after[bias], torch.stack(rows))
    assert torch.equal(after[BLOCK + "gate.weight"], before[BLOCK + "gate.weight"][:, list(plan.keep[TEXT])])
    assert torch.equal(after[BLOCK + "gate.weight_1"], before[BLOCK + "gate.weight_1"][:, list(plan.keep[VISION])])
