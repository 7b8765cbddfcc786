"""Experts as stacked weights: routers, loops and activations that are not the usual ones."""

import math

import pytest
import torch
from torch import Tensor, nn

from moeprune.calibrate.observer import Observer
from moeprune.calibrate.stats import Stats
from moeprune.errors import UnsupportedModelError
from tests.calibrate.experts.models import NUM_EXPERTS, PATHS, build
from tests.calibrate.experts.observing import assert_equal_sums, observe_at, run
from tests.calibrate.reference import gated_silu, random_rows, recording, slow_sums
from tests.fake_stats import facts


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def dbrx(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    rows = slice(24 * expert, 24 * (expert + 1))
    w1, v1, w2 = (getattr(module.mlp, name)[rows].double() for name in ("w1", "v1", "w2"))
    return (silu(w1 @ x) * (v1 @ x)) @ w2


def clamped_after_activation(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate, up = (module.gate_up_proj[expert].double() @ x).tensor_split(2)
    inner = silu(gate).clamp(max=module.limit) * up.clamp(-module.limit, module.limit)
    return module.down_proj[expert].double() @ inner


def clamped_before_activation(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate, up = (module.gate_up_proj[expert].double() @ x).tensor_split(2)
    inner = silu(gate.clamp(max=module.limit)) * up.clamp(-module.limit, module.limit)
    return module.down_proj[expert].double() @ inner


def gated_gelu(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate, up = (module.gate_up_proj[expert].double() @ x).tensor_split(2)
    inner = gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    return module.down_proj[expert].double() @ inner


FORMULAS = {
    "dbrx": dbrx, "longcat_flash": gated_silu, "step3p5": clamped_after_activation, "zaya": gated_silu,
    "inkling_text": gated_silu, "gemma4_text": gated_gelu, "phimoe": gated_silu,
    "deepseek_v4": clamped_before_activation, "ernie4_5_vl_moe_text": gated_silu,
}  # fmt: skip


PLAIN_RESIDUAL = {"step3p5", "phimoe", "ernie4_5_vl_moe_text"}
"""Layers in which the experts' module reads a norm of the stream and is added to it, and nothing else happens."""


def compare_with_reference(model_type, model):
    rows = random_rows("text", padding=4)
    with recording(model, PATHS[model_type]) as calls:
        run(model, rows)
    masks = list(rows.mask.split(2))
    experts, layers = slow_sums(
        model, calls, masks, paths=PATHS[model_type], num_experts=NUM_EXPERTS, run=FORMULAS[model_type]
    )
    stats = observe_at(model, PATHS[model_type], rows)
    assert_equal_sums(stats, experts, layers)
    return stats, calls


@pytest.mark.parametrize("model_type", FORMULAS)
def test_every_sum_equals_the_slow_formula(model_type):
    stats, _ = compare_with_reference(model_type, build(model_type))
    turned = () if model_type in PLAIN_RESIDUAL else ("token_gated_norm_sum",)
    assert stats.absent == (*turned, "margin_sum"), "the logits of a router that is not watched"
    assert stats.experts["count"].sum() > 0


def test_longcat_tokens_at_zero_experts_are_not_counted():
    stats, calls = compare_with_reference("longcat_flash", build("longcat_flash"))
    zero = sum(int((ids >= NUM_EXPERTS).sum()) for _, ids, _ in calls[0])
    assert zero > 0
    assert 0 < stats.experts["count"][0, 0].sum() < 29 * 3


def test_a_batch_that_only_zero_experts_take_is_observed():
    model = build("longcat_flash")
    with torch.no_grad():
        for layer in range(2):
            bias = model.get_submodule(f"model.layers.{layer}.mlp.router").e_score_correction_bias
            bias[:NUM_EXPERTS], bias[NUM_EXPERTS:] = -9.0, 9.0
    stats, _ = compare_with_reference("longcat_flash", model)
    assert (stats.experts["count"] == 0).all()
    assert (stats.layers["gate_entropy_sum"] > 0).all()


def test_zaya_tokens_that_skip_the_experts_are_not_counted_for_expert_0():
    model = build("zaya")
    with torch.no_grad():
        for layer in range(2):
            biases = model.get_submodule(f"model.layers.{layer}.mlp.gate").balancing_biases
            biases[:-1], biases[-1] = 0.0, 0.1
    stats, calls = compare_with_reference("zaya", model)
    skipped = sum(int(((weights == 0) & (ids == 0)).sum()) for _, ids, weights in calls[0])
    assert skipped > 0, "the skip class must be chosen here"
    assert 0 < stats.experts["count"][0, 0].sum() < 29


def test_phimoe_uses_two_experts_whatever_its_config_says():
    model = build("phimoe")
    assert model.config.num_experts_per_tok == 3
    stats, _ = compare_with_reference("phimoe", model)
    assert (stats.experts["count"].sum(-1) == 29 * 2).all()


def test_inkling_weights_of_shared_experts_are_not_those_of_routed_ones():
    """Its router shares the weight of a token among k routed and S shared experts."""
    model = build("inkling_text")
    stats, _ = compare_with_reference("inkling_text", model)
    router = model.get_submodule("model.layers.1.mlp.gate")
    whole = 29 * router.route_scale * router.global_scale.item()
    assert 0.05 < stats.experts["gate_sum"][0, 0].sum() / whole < 0.95


def test_weights_below_zero_count_by_their_size():
    """gemma4 multiplies the weights with a learned scale of each expert, inkling with one of the layer."""
    model = build("gemma4_text")
    with torch.no_grad():
        model.get_submodule("model.layers.0.router").per_expert_scale.copy_(torch.tensor([-1.0, 2, -3, 4, 5, -6]))
    stats, _ = compare_with_reference("gemma4_text", model)
    chosen = stats.experts["count"][0, 0] > 0
    assert (stats.experts["gate_sum"][0, 0, [0, 2, 5]][chosen[[0, 2, 5]]] < 0).all()
    assert (stats.experts["gated_norm_sum"][0, 0][chosen] > 0).all()


def test_deepseek_v4_hash_layers_are_counted_as_their_table_says():
    model = build("deepseek_v4")
    rows = random_rows("text", padding=4)
    table = model.get_submodule("model.layers.0.mlp.gate").tid2eid
    expected = torch.bincount(table[rows.ids[rows.mask]].reshape(-1), minlength=NUM_EXPERTS)
    stats = observe_at(model, PATHS["deepseek_v4"], rows)
    assert stats.experts["count"][0, 0].tolist() == expected.tolist()


def test_a_tower_without_tokens_has_sums_of_zero():
    stats, calls = compare_with_reference("ernie4_5_vl_moe_text", build("ernie4_5_vl_moe_text"))
    assert calls[1] == []
    assert stats.experts["count"][0].sum(-1).tolist() == [29 * 2, 0]


def observe_vision(model, *, mask):
    """A pass in which 6 of the batch's 22 tokens are of an image."""
    ids = random_rows("text", rows=2).ids
    types = torch.zeros_like(ids)
    types[:, 1:4] = 1
    observer = Observer(model, experts=PATHS["ernie4_5_vl_moe_text"], num_experts=NUM_EXPERTS)
    stats = Stats.zeros(facts(num_layers=2, num_experts=NUM_EXPERTS), domains=["text"])
    with torch.inference_mode(), observer.observing():
        observer.start()
        observer.set_mask(mask)
        model(ids, moe_mm_token_type_ids=types)
        observer.finish(stats, domain="text", tokens=ids.numel())
    return stats


def test_each_tower_is_observed_with_its_own_tokens():
    stats = observe_vision(build("ernie4_5_vl_moe_text"), mask=None)
    assert stats.experts["count"][0].sum(-1).tolist() == [16 * 2, 6 * 2]


def test_experts_that_are_given_other_tokens_than_the_text_are_refused():
    with pytest.raises(UnsupportedModelError) as error:
        observe_vision(build("ernie4_5_vl_moe_text"), mask=torch.ones(2, 11, dtype=torch.bool))
    assert str(error.value) == (
        "layers.1.mlp.text_moe.experts was given 16 tokens for a batch of 22: this model does not run its experts on "
        "every token that it reads, once, so that its statistics would not be those of the text."
    )
