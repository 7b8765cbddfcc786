"""The published models the whole way: their config and layout at toy size, inspected, calibrated, planned, exported.

What was exported is held against the plan in memory, and against the whole model whose routers are kept from choosing
the dropped experts, which knows nothing of plans.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moeprune.anatomy.inspect import inspect_model
from moeprune.anatomy.source import Source, open_source
from moeprune.apply.memory import apply_plan
from moeprune.calibrate.data import Rows
from moeprune.calibrate.passes import collect_stats
from moeprune.checkpoint.load import load_model
from moeprune.export.export import export_checkpoint
from moeprune.plan.plan import Plan
from moeprune.plan.uniform import make_plan
from tests.anatomy.published import MODELS
from tests.anatomy.published.shrunk import LAYERS, VOCAB, hub_patterns, is_routed, patterns_of, write_published

FIXED_TOP_K = ("Phi-3.5-MoE",)
COUNT_KEYS: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS: tuple[str, ...] = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "moe_top_k")
ROUTER = re.compile(r"\.(gate|router|router\.layer|gate\.wg)\.weight$")
CORRECTION = re.compile(r"\.(e_score_correction_bias|expert_bias)$")
NEVER = -1e4  # so low a logit or bias that the expert is not chosen
PREDICTION = re.compile(rf"(?:^|\.)(?:mtp(?:_\w+)?|layers\.{LAYERS})\.")


@dataclass
class Case:
    """A small checkpoint of a published model, a plan for it and the folder that was exported."""

    source: Source
    model: PreTrainedModel
    plan: Plan
    out: Path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.source.path / "config.json").read_text())

    @property
    def predicts(self) -> bool:
        """Whether there are multi-token prediction layers."""
        return bool(self.config.get("num_nextn_predict_layers")) or self.config["model_type"] == "qwen3_next"


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory) -> Case:
    folder = write_published(request.param, tmp_path_factory.mktemp("published") / "source")
    source, model = open_source(folder), load_model(folder, dtype="float32")
    rows = Rows("text", tokens(8), torch.ones_like(tokens(8), dtype=torch.bool))
    stats = collect_stats(model, anatomy=source.anatomy, facts=source.facts, domains=[rows], quiet=True)
    lower = source.facts.top_k > 1 and request.param not in FIXED_TOP_K
    plan = make_plan(stats, score="soft-frequency", keep=0.75, top_k=source.facts.top_k - lower)
    assert len({layer.keep for layer in plan.layers}) > 1, "another selection in different layers"
    export_checkpoint(folder, plan=plan, out=folder.with_name("out"), quiet=True)
    return Case(source, model, plan, folder.with_name("out"))


def tokens(rows: int) -> Tensor:
    return torch.randint(VOCAB - 10, (rows, 24), generator=torch.Generator().manual_seed(rows))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(2), use_cache=False).logits


def with_counts(config: Any, counts: dict[str, Any]) -> Any:
    """A config with some numbers replaced, also where they stand in a list or a config inside."""
    if not isinstance(config, dict):
        return config
    changed = {key: with_counts(value, counts) for key, value in config.items()}
    for key in counts.keys() & changed.keys():
        changed[key] = [counts[key]] * len(changed[key]) if isinstance(changed[key], list) else counts[key]
    return changed


def without_added(config: Any, before: Any) -> Any:
    """A config without the keys that it had not before."""
    if not isinstance(config, dict):
        return config
    return {key: without_added(value, before[key]) for key, value in config.items() if key in before}


class Masked(TorchFunctionMode):
    """Inside, the products with these weights have low values in these columns."""

    def __init__(self, columns: dict[int, list[int]]):
        super().__init__()
        self.columns = columns
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.linear or id(args[1]) not in self.columns:
            return answer
        self.met.add(id(args[1]))
        return answer.index_fill(-1, torch.tensor(self.columns[id(args[1])]), NEVER)


def masked_logits(case: Case, tmp_path: Path) -> Tensor:
    """Logits of the whole model, which cannot choose the dropped experts and uses as many as the plan says."""
    (tmp_path / "model.safetensors").symlink_to(case.source.path / "model.safetensors")
    config = with_counts(case.config, dict.fromkeys(TOP_K_KEYS, case.plan.top_k))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, dtype="float32")
    state = model.state_dict(keep_vars=True)
    columns = {}
    for layer in case.plan.layers:
        dropped = sorted(set(range(case.plan.model.num_experts)) - set(layer.keep))
        for name in (name for name in state if name.startswith(f"{layer.layer}.")):
            if ROUTER.search(name):
                columns[id(state[name])] = dropped
            elif CORRECTION.search(name):
                state[name].data[..., dropped] = NEVER
    with Masked(columns) as masked:
        found = logits(model)
    assert len(masked.met) == len(case.plan.layers), "every router was met"
    return found


def test_experts_and_routers_are_stored_as_on_the_hub(case):
    trunk = (key for key in case.source.checkpoint.tensors if not PREDICTION.search(key))
    assert patterns_of(trunk) == hub_patterns(case.config["model_type"])


def test_on_disk_in_memory_and_masked_it_is_one_model(case, tmp_path):
    exported = logits(load_model(case.out, dtype="float32"))
    in_memory = logits(apply_plan(case.model, plan=case.plan, anatomy=case.source.anatomy))
    assert torch.equal(exported, in_memory)
    torch.testing.assert_close(exported, masked_logits(case, tmp_path), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exported, logits(case.model), rtol=1e-2, atol=1e-2), "the dropped experts mattered"


def test_the_config_differs_in_its_counts_under_every_name(case):
    """Unknown keys stay, in their order; further names of the counts may follow."""
    top_k = dict.fromkeys(TOP_K_KEYS, case.plan.top_k)
    expected = with_counts(with_counts(case.config, dict.fromkeys(COUNT_KEYS, case.plan.num_experts)), top_k)
    written = json.loads((case.out / "config.json").read_text())
    assert json.dumps(without_added(written, expected)) == json.dumps(expected)
    facts = open_source(case.out).facts
    assert (facts.num_experts, facts.top_k) == (case.plan.num_experts, case.plan.top_k)


@pytest.mark.parametrize("which", ["source", "out"])
def test_inspect_counts_the_stored_parameters(case, which):
    folder = case.source.path if which == "source" else case.out
    stored = load_file(folder / "model.safetensors")
    trunk = {key: t.numel() for key, t in stored.items() if not PREDICTION.search(key) and "inv_freq" not in key}
    experts = sum(number for key, number in trunk.items() if is_routed(key))
    found = inspect_model(folder)
    assert found["parameters"]["total"] == sum(trunk.values())
    assert found["parameters"]["by_part"]["routed experts"] == experts
    vision = sum(number for key, number in trunk.items() if key.startswith(("vision", "multi_modal")))
    share = found["top_k"] / found["num_experts"]
    assert found["parameters"]["active"] == sum(trunk.values()) - vision - experts + round(experts * share)
    assert found["bytes"]["total"] == sum(t.numel() * t.element_size() for t in stored.values())
    prediction = sum(t.numel() for key, t in stored.items() if PREDICTION.search(key))
    assert (found["multi_token_prediction"] or {"parameters": 0})["parameters"] == prediction


def test_prediction_layers_are_pruned_as_the_last_layer_is(case):
    before, after = (load_file(folder / "model.safetensors") for folder in (case.source.path, case.out))
    keep = list(case.plan.layers[-1].keep)
    prediction = {key: tensor for key, tensor in before.items() if PREDICTION.search(key)}
    assert bool(prediction) == case.predicts
    expected = {}
    for key, tensor in prediction.items():
        number = re.search(r"experts\.(\d+)\.", key)
        if number is None:
            routed = ".gate.weight" in key or "e_score_correction_bias" in key
            expected[key] = tensor[keep] if routed else tensor
        elif int(number[1]) in keep:
            expected[key.replace(number[0], f"experts.{keep.index(int(number[1]))}.")] = tensor
    assert {key for key in after if PREDICTION.search(key)} == expected.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())
