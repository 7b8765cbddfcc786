"""Experts that a router is kept from by a bias of -inf: they can be dropped, and kept where enough others are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.apply.memory import apply_plan
from moeprune.checkpoint.load import load_model
from moeprune.errors import CheckpointError, PlanError
from moeprune.export.export import export_checkpoint
from moeprune.plan.plan import LayerPlan, Plan
from tests.models import save
from tests.pruning import edit_tensors, logits

BIASES = {
    "glm4_moe": [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)],
    "gpt_oss": [f"model.layers.{layer}.mlp.router.bias" for layer in (0, 1)],
}
MASKED = [2, 5, 8]  # of 10


def masked(family: str, folder: Path, *, value: float = -float("inf"), dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint whose routers do not choose :data:`MASKED`."""
    save(family, folder, dtype=dtype)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in BIASES[family]:
            tensors[key][MASKED] = value

    edit_tensors(folder, edit)
    return folder


def plan_keeping(folder: Path, keep: tuple[int, ...], *, top_k: int = 3) -> Plan:
    facts = open_source(folder).facts
    layers = tuple(LayerPlan(layer=name, keep=keep) for name in facts.layers)
    return Plan(model=facts, num_experts=len(keep), top_k=top_k, layers=layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BIASES)
def test_dropping_them_changes_nothing(tmp_path, family, dtype):
    """Such a checkpoint was once called damaged, also when just these experts were to go."""
    source = masked(family, tmp_path / "source", dtype=dtype)
    plan = plan_keeping(source, (0, 1, 3, 4, 6, 7, 9))
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    before, after = (load_model(folder, dtype="float32") for folder in (source, tmp_path / "out"))
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", BIASES)
def test_they_may_stay_where_enough_others_do(tmp_path, family):
    """Layers with fewer live experts than others are filled up with them."""
    source = masked(family, tmp_path / "source")
    plan = plan_keeping(source, (0, 1, 2, 3, 5))
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    in_memory = apply_plan(load_model(source), plan=plan, anatomy=open_source(source).anatomy)
    assert torch.equal(logits(in_memory), logits(load_model(tmp_path / "out")))


@pytest.mark.parametrize("family", BIASES)
def test_too_few_others(tmp_path, family):
    """A router that runs out of others takes masked experts after all."""
    source = masked(family, tmp_path / "source")
    with pytest.raises(PlanError) as error:
        export_checkpoint(source, plan=plan_keeping(source, (0, 1, 2, 5, 8)), out=tmp_path / "out", quiet=True)
    plan = plan_keeping(source, (0, 1, 2, 5, 8))
    assert str(error.value) == (
        f"{plan.layers[0].layer}: of the 5 experts that the plan keeps, 2 can be chosen (the others have -inf in "
        f"{BIASES[family][0]!r}), and a token uses 3. Keep others, or lower --top-k."
    )
    assert not (tmp_path / "out").exists()
    export_checkpoint(source, plan=plan_keeping(source, (0, 1, 2, 5, 8), top_k=2), out=tmp_path / "out", quiet=True)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("family", BIASES)
def test_other_values_that_are_not_finite_are_damage(tmp_path, family, value):
    source = masked(family, tmp_path / "source", value=value)
    with pytest.raises(CheckpointError, match=rf"expert 2 \(element \[2\]\) of '{BIASES[family][0]}' is not a finite"):
        export_checkpoint(source, plan=plan_keeping(source, (0, 1, 3, 4)), out=tmp_path / "out", quiet=True)
