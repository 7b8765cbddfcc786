"""Multi-token prediction layers: pruned with the trunk or left out, never at odds with the config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeprune.anatomy.source import open_source
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from tests.models import save
from tests.pruning import edit_config, edit_tensors, random_plan

LAST = "model.layers.2."
TRUNK = {"deepseek_v3": LAST, "qwen3_moe": LAST}
# Where checkpoints keep the layer: behind the last decoder layer (DeepSeek, GLM) or under a name of its own (Qwen).
PREFIXES = ["model.layers.3.", "mtp.layers.0.", "model.mtp.layers.0.mtp_block."]


def with_mtp(folder: Path, prefix: str, *, family: str = "deepseek_v3") -> Path:
    """A checkpoint with a prediction layer: the last decoder layer's tensors with other values, and some of its own."""
    save(family, folder)
    generator = torch.Generator().manual_seed(1)

    def add(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(TRUNK[family])]:
            tensors[prefix + key.removeprefix(TRUNK[family])] = torch.randn(tensors[key].shape, generator=generator)
        tensors[prefix + "eh_proj.weight"] = torch.randn(32, 64, generator=generator)

    edit_tensors(folder, add)
    edit_config(folder, num_nextn_predict_layers=1)
    return folder


def export(folder: Path, out: Path, *, mtp: str = "prune"):
    plan = random_plan(open_source(folder).facts, keep=8, top_k=2).model_copy(update={"mtp": mtp})
    export_checkpoint(folder, plan=plan, out=out, quiet=True)
    return plan, load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prediction_layer_has_as_many_experts_as_the_pruned_config_says(tmp_path, prefix):
    """Copied as it is, an engine that drafts with it would build 8 experts and find 16."""
    plan, before, after = export(with_mtp(tmp_path / "source", prefix), tmp_path / "out")
    keep = list(plan.layers[-1].keep)
    router = prefix + "mlp.gate.weight"
    assert torch.equal(after[router], before[router][keep])
    bias = prefix + "mlp.gate.e_score_correction_bias"
    assert torch.equal(after[bias], before[bias][keep])
    expert = prefix + "mlp.experts.{}.up_proj.weight"
    assert all(torch.equal(after[expert.format(new)], before[expert.format(old)]) for new, old in enumerate(keep))
    assert expert.format(8) not in after
    assert torch.equal(after[prefix + "eh_proj.weight"], before[prefix + "eh_proj.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    checks = verify_checkpoint(tmp_path / "out", plan=plan, against=tmp_path / "source", quiet=True)
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("prefix", PREFIXES)
def test_left_out_prediction_layers_are_gone_from_tensors_and_config(tmp_path, prefix):
    plan, before, after = export(with_mtp(tmp_path / "source", prefix), tmp_path / "out", mtp="drop")
    assert not any(key.startswith(prefix) for key in after)
    assert {key for key in before if key.startswith(prefix)} == set(open_source(tmp_path / "source").mtp)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    checks = verify_checkpoint(tmp_path / "out", plan=plan, against=tmp_path / "source", quiet=True)
    assert all(check.passed for check in checks), checks


def refused(folder: Path, edit: Callable[[dict[str, Tensor]], object], kind: type[Exception]) -> str:
    edit_tensors(folder, edit)
    with pytest.raises(kind) as error:
        open_source(folder)
    return str(error.value)


def test_a_prediction_layer_without_all_experts_is_refused(tmp_path):
    folder = with_mtp(tmp_path, "mtp.layers.0.")
    message = refused(
        folder, lambda tensors: tensors.pop("mtp.layers.0.mlp.experts.15.up_proj.weight"), CheckpointError
    )
    assert "have experts 0 to 14 of 'mtp.layers.0.mlp.experts.*.up_proj.weight' (15), the config says 16" in message


def test_a_router_that_looks_like_none_of_the_trunk_is_refused_by_name(tmp_path):
    folder = with_mtp(tmp_path, "mtp.layers.0.")
    message = refused(
        folder, lambda tensors: tensors.update({"mtp.layers.0.mlp.router.weight": torch.zeros(16, 32)}),
        UnsupportedModelError,
    )  # fmt: skip
    assert "'mtp.layers.0.mlp.router.weight', [16, 32], of a multi-token prediction layer may hold experts" in message
    assert message.endswith("Leave these layers out with --mtp drop.")
