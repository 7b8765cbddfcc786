"""Every MoE type of the installed transformers: calibrate, plan, apply, export, reload, and the same logits.

The types are found by walking the package. One that cannot be pruned is in the table with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from moeprune.anatomy.source import Source, open_source
from moeprune.anatomy.tiny import NUM_EXPERTS, VOCAB, tiny_config
from moeprune.apply.memory import apply_plan
from moeprune.calibrate.data import Rows
from moeprune.calibrate.passes import collect_stats
from moeprune.checkpoint.classes import model_class
from moeprune.checkpoint.load import load_model
from moeprune.errors import UnsupportedModelError
from moeprune.export.export import export_checkpoint
from moeprune.families import derive_families, list_families, to_markdown
from moeprune.plan.plan import Plan
from moeprune.plan.uniform import make_plan
from tests.pruning import random_plan

FAMILIES = {family.model_type: family for family in list_families() if family.prunable}
DOCS = Path(__file__).parents[1] / "docs" / "families.md"
KEEP = 9  # of 12, also in three groups


@dataclass
class Case:
    """One type, saved as a checkpoint and loaded from it."""

    name: str
    folder: Path
    source: Source
    model: PreTrainedModel

    @property
    def top_k(self) -> int:
        top_k = self.source.anatomy.top_k
        return top_k.value if top_k.fixed else 2


def build(name: str) -> PreTrainedModel:
    """A tiny model with random weights large enough that every expert matters."""
    config = tiny_config(CONFIG_MAPPING[name])
    torch.manual_seed(0)
    model = model_class(config)._from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.ones(()) if "norm" in key else torch.randn(tensor.shape, generator=generator) * 0.2)
            elif key.endswith("tid2eid"):
                ids = [torch.randperm(NUM_EXPERTS, generator=generator)[: tensor.shape[1]] for _ in tensor]
                tensor.copy_(torch.stack(ids))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    build(request.param).save_pretrained(folder)
    return Case(request.param, folder, open_source(folder), load_model(folder))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model = getattr(model, "thinker", model)  # Qwen3-Omni has no forward pass of its own
    torch.manual_seed(0)  # diffusion models begin with noise
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, **more).logits


def text(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB - 20, (rows, length), generator=torch.Generator().manual_seed(7))


def assert_same(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """The same tensors and the same logits, bit for bit."""
    before, after = a.state_dict(), b.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected, found = logits(a, text(3, 21)), logits(b, text(3, 21))
    if any("mamba" in type(module).__name__.lower() for module in a.modules()):
        # The state-space layers multiply slices of odd sizes, which torch rounds differently at other addresses.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def counts(case: Case, ids: Tensor) -> Tensor:
    """How many tokens each expert of each layer takes, (layers, experts)."""
    rows = Rows("text", ids, torch.ones_like(ids, dtype=torch.bool))
    stats = collect_stats(case.model, anatomy=case.source.anatomy, facts=case.source.facts, domains=[rows], quiet=True)
    return torch.from_numpy(stats.experts["count"][0])


# The walk


def test_the_table_is_what_the_installed_release_gives():
    """A type that a new release brings is covered or named, never passed over."""
    assert list(derive_families()) == list_families()


def test_the_table_of_the_documentation_is_this_one():
    assert to_markdown(list_families()) in DOCS.read_text(encoding="utf-8")


def test_every_type_that_cannot_be_pruned_says_why():
    assert all(family.reason for family in list_families() if not family.prunable)


# Each type


def test_a_plan_in_memory_and_on_disk_gives_the_same_logits(case, tmp_path):
    plan = random_plan(case.source.facts, keep=KEEP, top_k=case.top_k)
    assert len({layer.keep for layer in plan.layers}) == len(plan.layers), "another selection in every layer"
    original = logits(case.model, text(3, 21))
    in_memory = apply_plan(case.model, plan=plan, anatomy=case.source.anatomy)
    export_checkpoint(case.folder, plan=plan, out=tmp_path / "out", quiet=True)
    assert_same(in_memory, load_model(tmp_path / "out"))
    assert logits(in_memory, text(3, 21)).isfinite().all()
    assert not torch.allclose(original, logits(in_memory, text(3, 21)))


def test_a_checkpoint_with_all_experts_of_a_layer_in_one_tensor(case, tmp_path):
    if "or all in one" not in FAMILIES[case.name].stored:
        pytest.skip("has one layout, which the other tests use")
    case.model.save_pretrained(tmp_path / "source", save_original_format=False)
    fused = load_file(tmp_path / "source" / "model.safetensors").keys()
    assert fused != load_file(case.folder / "model.safetensors").keys(), "the layout under test"
    plan = random_plan(open_source(tmp_path / "source").facts, keep=KEEP, top_k=case.top_k)
    export_checkpoint(tmp_path / "source", plan=plan, out=tmp_path / "out", quiet=True)
    assert_same(apply_plan(case.model, plan=plan, anatomy=case.source.anatomy), load_model(tmp_path / "out"))


def test_calibration_gives_a_plan(case):
    if FAMILIES[case.name].statistics.startswith("none"):
        with pytest.raises(UnsupportedModelError):
            counts(case, text(2, 8))
        return
    rows = Rows("text", text(8, 16), torch.ones(8, 16, dtype=torch.bool))
    stats = collect_stats(case.model, anatomy=case.source.anatomy, facts=case.source.facts, domains=[rows], quiet=True)
    plan = make_plan(stats, score="frequency", keep_experts=KEEP, top_k=case.top_k)
    plan.check(case.source.facts)
    assert stats.experts["count"].sum() > 0


def test_experts_that_no_token_uses_can_go(case):
    """What is kept computes what it computed: no expert, router row, bias or id has changed places."""
    family, anatomy = FAMILIES[case.name], case.source.anatomy
    if family.statistics.startswith("none") or not _selects_alike(case):
        pytest.skip("its kept experts are weighted otherwise when others go")
    ids = text(1, 1)
    used = counts(case, ids) > 0
    keep = []
    for layer in used:
        ranked = sorted(range(NUM_EXPERTS), key=lambda expert, layer=layer: (not layer[expert], -expert))
        keep.append(tuple(sorted(ranked[:KEEP])))
    plan = random_plan(case.source.facts, keep=KEEP, top_k=anatomy.top_k.value)
    layers = tuple(layer.model_copy(update={"keep": k}) for layer, k in zip(plan.layers, keep, strict=True))
    plan = Plan.model_validate(plan.model_copy(update={"layers": layers, "n_group": None}).model_dump())
    pruned = apply_plan(case.model, plan=plan, anatomy=anatomy)
    torch.testing.assert_close(logits(pruned, ids), logits(case.model, ids), rtol=1e-4, atol=1e-4)


def _selects_alike(case: Case) -> bool:
    """Whether gate weights depend on the chosen experts alone, and groups do not decide with others."""
    routing = case.source.anatomy.routing
    if routing.n_group > 1 or case.source.anatomy.expert_ids:
        return False
    return routing.renormalised is True or routing.scoring == "sigmoid"
