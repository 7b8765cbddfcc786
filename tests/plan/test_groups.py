"""Group-limited routing: what transformers does with groups of unequal size, and how it is turned off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.source import open_source
from moeprune.anatomy.tiny import tiny_config
from moeprune.apply.memory import apply_plan
from moeprune.calibrate.stats import Stats
from moeprune.checkpoint.load import load_model
from moeprune.errors import PlanError
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from moeprune.plan.plan import LayerPlan, Plan, num_to_keep
from moeprune.plan.uniform import make_plan
from tests.fake_stats import facts, fake_stats
from tests.models import FAMILIES, build, save
from tests.pruning import logits

# Of 16 experts in 4 groups (V3) and 12 in 3 (V2): unequal numbers of each group, other experts in every layer.
UNEQUAL = {
    "deepseek_v3": ((0, 1, 2, 3, 4, 8, 9, 15), (1, 5, 6, 7, 11, 12, 13, 14)),
    "deepseek_v2": ((0, 1, 2, 3, 8), (4, 5, 6, 7, 10)),
}


def ungrouped_plan(source: Path, family: str, *, top_k: int = 2) -> Plan:
    model = open_source(source).facts
    kept = UNEQUAL[family]
    layers = tuple(LayerPlan(layer=name, keep=ids) for name, ids in zip(model.layers, kept, strict=True))
    return Plan(model=model, num_experts=len(kept[0]), top_k=top_k, layers=layers, n_group=1)


def test_transformers_runs_scrambled_on_some_token_counts_instead_of_failing():
    """18 experts in 4 groups: a whole number of groups over all tokens is enough for transformers' reshape."""
    config = FAMILIES["deepseek_v3"]()
    config.n_routed_experts = 18
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ran = []
    for num_tokens in range(1, 13):
        try:
            run(model, torch.arange(num_tokens))
            ran.append(num_tokens)
        except RuntimeError as error:
            assert "invalid for input of size" in str(error)
    # A token's router row has 18 numbers; transformers views them all as rows of 4 groups x 4 experts.
    assert ran == [n for n in range(1, 13) if n * 18 % 16 == 0] == [8]
    # The last group of a row then holds experts of two tokens, and a token hears from the one after it.
    first = torch.stack([run(model, torch.tensor([5, later, *range(6)]))[0] for later in range(6, 30)])
    assert (first - first[0]).abs().max() > 1e-3


def run(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def test_groups_of_unequal_size_are_refused_before_anything_is_written(tmp_path):
    source = save("deepseek_v3", tmp_path / "source")
    plan = ungrouped_plan(source, "deepseek_v3").model_copy(update={"n_group": None})
    with pytest.raises(PlanError, match=r"keeps \[4, 1, 2, 1\] experts of its 4 groups.*plan with --no-groups\.$"):
        export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match=r"routes in 4 groups of equal size\. Keep 12 or 16\.$"):
        make_plan(fake_stats(facts(num_experts=16, n_group=4, topk_group=2)), score="reap", keep_experts=14)


@pytest.mark.parametrize("family", UNEQUAL)
def test_without_groups_export_equals_apply(tmp_path, family):
    source = save(family, tmp_path / "source")
    plan = ungrouped_plan(source, family)
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    in_memory = apply_plan(load_model(source), plan=plan, anatomy=open_source(source).anatomy)
    on_disk = load_model(tmp_path / "out")
    assert torch.equal(logits(in_memory), logits(on_disk))
    assert all(check.passed for check in verify_checkpoint(tmp_path / "out", quiet=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert open_source(tmp_path / "out").anatomy.routing.n_group == 1


def test_without_groups_deepseek_v2_routes_as_its_lite_checkpoints_do(tmp_path):
    """transformers looks at topk_method, vLLM and llama.cpp at n_group: both must say that there are no groups."""
    source = save("deepseek_v2", tmp_path / "source")
    export_checkpoint(source, plan=ungrouped_plan(source, "deepseek_v2"), out=tmp_path / "out", quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["topk_method"], config["n_group"], config["topk_group"]) == ("greedy", 1, 1)
    applied = apply_plan(
        load_model(source), plan=ungrouped_plan(source, "deepseek_v2"), anatomy=open_source(source).anatomy
    )
    assert applied.config.topk_method == "greedy"


def test_other_engines_topk_method_survives(tmp_path):
    source = save("deepseek_v3", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"topk_method": "noaux_tc"}))
    export_checkpoint(source, plan=ungrouped_plan(source, "deepseek_v3"), out=tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["topk_method"] == "noaux_tc"


def test_without_groups_a_token_gets_the_best_of_all_kept_experts():
    """Against the whole model without groups in which the dropped experts cannot be chosen."""
    model = build("deepseek_v3")
    source = model.config.to_dict() | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    masked = AutoModelForCausalLM.from_config(type(model.config)(**source)).eval()
    masked.load_state_dict(model.state_dict())
    for layer, ids in zip((1, 2), UNEQUAL["deepseek_v3"], strict=True):
        dropped = sorted(set(range(16)) - set(ids))
        masked.model.layers[layer].mlp.gate.e_score_correction_bias[dropped] = -1e4
    anatomy = derive_anatomy(model.config)
    model_facts = anatomy.facts(name="tiny", fingerprint="ab" * 32)
    plan = Plan(
        model=model_facts,
        num_experts=8,
        top_k=2,
        n_group=1,
        layers=tuple(
            LayerPlan(layer=name, keep=ids)
            for name, ids in zip(model_facts.layers, UNEQUAL["deepseek_v3"], strict=True)
        ),
    )
    pruned = apply_plan(model, plan=plan, anatomy=anatomy)
    torch.testing.assert_close(logits(pruned), logits(masked), rtol=1e-5, atol=1e-5)
    grouped = masked.config.to_dict() | {"n_group": 4, "topk_group": 2}
    other = AutoModelForCausalLM.from_config(type(model.config)(**grouped)).eval()
    other.load_state_dict(masked.state_dict())
    assert (logits(other) - logits(masked)).abs().max() > 1e-2  # the groups do matter in this model


def test_without_groups_the_best_experts_are_chosen_across_groups():
    stats = Stats.zeros(facts(num_layers=1, num_experts=12, n_group=3, topk_group=2), domains=["text"])
    stats.tokens[:] = 1000
    stats.experts["count"][0, 0] = [90, 80, 70, 60, 9, 8, 7, 6, 50, 2, 3, 4]
    grouped = make_plan(stats, score="frequency", keep_experts=6)
    assert grouped.keep == {"model.layers.1": (0, 1, 4, 5, 8, 11)}
    plan = make_plan(stats, score="frequency", keep_experts=5, groups=False)
    assert plan.keep == {"model.layers.1": (0, 1, 2, 3, 8)}
    assert (plan.n_group, plan.num_groups) == (1, 1)
    assert any("group-limited routing is turned off: a token could use 2 of 3 groups" in w for w in plan.warnings)
    assert not any("group-limited" in warning for warning in grouped.warnings)


def test_without_groups_a_share_is_not_rounded_to_groups():
    model = facts(num_experts=16, n_group=4, topk_group=2)
    assert num_to_keep(model, keep=0.45) == 8
    assert num_to_keep(model, keep=0.45, n_group=1) == 7


def test_turning_groups_off_is_a_caveat_even_with_all_experts_kept():
    stats = fake_stats(facts(num_experts=16, n_group=4, topk_group=2))
    plan = make_plan(stats, score="reap", groups=False)
    assert np.array_equal([len(layer.keep) for layer in plan.layers], [16, 16])
    assert [warning.partition(":")[0] for warning in plan.warnings] == ["group-limited routing is turned off"]


def test_a_plan_written_before_groups_could_be_turned_off_still_loads(tmp_path):
    stats = fake_stats(facts(num_experts=16, n_group=4, topk_group=2))
    make_plan(stats, score="reap", keep=0.5).save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    del values["n_group"]
    del values["model"]["routing"]["group_score"]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.n_group, plan.num_groups, plan.model.routing.group_score) == (None, 4, "top2")


def test_only_one_group_means_that_there_are_none():
    """Two of two groups look ungrouped to transformers; llama.cpp refuses to load them."""
    model = facts(num_experts=16, n_group=4, topk_group=2)
    with pytest.raises(ValueError, match="n_group"):
        Plan(model=model, num_experts=16, top_k=2, layers=(), n_group=2)  # pyright: ignore[reportArgumentType]


def test_without_groups_every_name_of_their_number_is_one(tmp_path):
    """Ling and Ring call it num_expert_group, and transformers takes n_group for an alias that it overrides."""
    torch.manual_seed(0)
    config = tiny_config(transformers.BailingHybridConfig, num_key_value_heads=4)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    opened = open_source(source)
    assert opened.facts.routing.n_group == config.n_group > 1
    kept = tuple(range(2, 2 + opened.facts.num_experts // 2 + 1))
    plan = Plan(
        model=opened.facts,
        num_experts=len(kept),
        top_k=2,
        n_group=1,
        layers=tuple(LayerPlan(layer=name, keep=kept) for name in opened.facts.layers),
    )
    export_checkpoint(source, plan=plan, out=tmp_path / "out", quiet=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {written[name] for name in ("num_expert_group", "n_group", "topk_group")} == {1}
    in_memory = apply_plan(load_model(source), plan=plan, anatomy=opened.anatomy)
    assert torch.equal(logits(in_memory), logits(load_model(tmp_path / "out")))
