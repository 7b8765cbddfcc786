"""Every quantity of every level equals its formula, written out token by token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.quantities import LEVELS, NUM_BINS, QUANTITIES, TABLE, at_level, cost_of
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.sums import turn
from moeprune.errors import StatsError
from tests.calibrate.experts.models import NUM_EXPERTS, PATHS
from tests.calibrate.experts.models import build as build_odd
from tests.calibrate.reference import EXPERTS, assert_close, random_rows
from tests.calibrate.reference_more import observe_all, slow_quantities
from tests.fake_stats import facts
from tests.models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_quantity_equals_the_slow_formula(family):
    model, rows = build(family), random_rows("text", rows=3, padding=4)
    sample = TokenSample([rows], tokens=7)
    sampled = {(int(row), int(at)) for row, at in zip(sample.row, sample.position, strict=True)}
    stats = observe_all(model, rows, statistics="full", sample=sample, batch_size=3)
    expected = slow_quantities(model, rows, sampled=sampled)
    assert expected.keys() | EXPERTS | {"gate_entropy_sum"} == QUANTITIES.keys()
    assert stats.absent == ()
    for name, want in expected.items():
        got = stats.group(name)[name]
        got = got[0] if "domains" in QUANTITIES[name].axes else got
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6 * scale, err_msg=f"{family} {name}")


@pytest.mark.parametrize("statistics", LEVELS)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_no_bit_of_the_logits_changes_at_any_level(family, statistics):
    model, rows = build(family, dtype=torch.bfloat16), random_rows("text", rows=2)
    anatomy = derive_anatomy(model.config)
    observer = Observer.of(model, anatomy, statistics=statistics, sample=TokenSample([rows], tokens=5))
    with torch.inference_mode():
        plain = model(rows.ids).logits
        with observer.observing():
            observer.start("text")
            observer.set_mask(rows.mask, rows=range(2))
            observed = model(rows.ids).logits
    assert torch.equal(plain, observed)


@pytest.mark.parametrize("statistics", LEVELS)
def test_a_level_has_all_of_those_below_it(statistics):
    model, rows = build("mixtral"), random_rows("text")
    stats = observe_all(model, rows, statistics=statistics, sample=TokenSample([rows], tokens=5))
    given = {*stats.experts, *stats.layers, *stats.more}
    assert given == {quantity.name for quantity in TABLE if LEVELS.index(quantity.level) <= LEVELS.index(statistics)}


def test_an_unknown_level_is_refused_with_the_known_ones():
    with pytest.raises(StatsError, match=r"unknown level of statistics 'ful'\. Did you mean 'full'\?"):
        at_level("ful")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_result_does_not_depend_on_the_batch_size(family):
    model, rows = build(family), random_rows("text", rows=5, padding=4)
    sample = TokenSample([rows], tokens=9)
    one, many = (observe_all(model, rows, statistics="full", sample=sample, batch_size=size) for size in (1, 4))
    assert_close(one, many, rtol=1e-4)


def test_gates_by_rank_add_up_to_one_for_every_token():
    stats = observe_all(build("qwen3_moe"), random_rows("text", padding=4))
    np.testing.assert_allclose(stats.more["rank_gate_sum"].sum(-1), 29, rtol=1e-6)
    assert (np.diff(stats.more["rank_gate_sum"]) <= 0).all()
    np.testing.assert_array_equal(stats.more["gate_ratio_count"].sum(-1), 29)
    assert (stats.more["gate_ratio_count"][..., 0, NUM_BINS - 1] == 29).all(), "the largest weight is all of itself"


def test_the_diagonal_of_coactivation_is_the_count():
    stats = observe_all(build("gpt_oss"), random_rows("text", padding=4), statistics="merge")
    pairs = stats.more["coactivation"]
    np.testing.assert_array_equal(np.diagonal(pairs, axis1=-2, axis2=-1), stats.experts["count"])
    np.testing.assert_array_equal(pairs, pairs.swapaxes(-1, -2))


@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.1, 3.0])
def test_a_small_turn_of_the_stream_is_not_lost_to_rounding(share):
    """In float32 the cosine of a turn of 1e-5 is 1."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 64, generator=generator), share * torch.randn(50, 64, generator=generator)
    wide, tall = x.double(), y.double()
    # The half-angle formula: 1 - cos = |u - v|^2 / 2 of the unit vectors u and v.
    unit = torch.nn.functional.normalize(wide, dim=-1) - torch.nn.functional.normalize(wide + tall, dim=-1)
    torch.testing.assert_close(turn(x, y), unit.square().sum(-1) / 2, rtol=2e-5, atol=0.0)


def test_a_turn_back_and_a_turn_to_nothing():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    y = torch.tensor([[-6.0, -8.0], [-3.0, -4.0], [1.0, 0.0], [0.0, 0.0]])
    assert turn(x, y).tolist() == [2, 0, 0, 0]


def odd_observer(model_type, *, routers):
    model = build_odd(model_type)
    paths = PATHS[model_type]
    return model, Observer(
        model, experts=paths, num_experts=NUM_EXPERTS, statistics="full", routers=routers,
        sample=TokenSample([random_rows("text")], tokens=4),
    )  # fmt: skip


def run_odd(model, observer, num_layers):
    rows = random_rows("text")
    stats = Stats.zeros(
        facts(num_layers=num_layers, num_experts=NUM_EXPERTS, top_k=2), domains=["text"], sums=observer.quantities,
        statistics="full",
    )  # fmt: skip
    with torch.inference_mode(), observer.observing():
        observer.start("text")
        observer.set_mask(rows.mask, rows=range(len(rows)))
        model(rows.ids)
        observer.finish(stats, domain="text", tokens=rows.num_tokens)
    stats.check("test")
    return stats


def test_llama4_gives_contributions_and_logits_and_nothing_of_the_unweighted_output():
    routers = tuple(path.replace("experts", "router") for path in PATHS["llama4_text"])
    model, observer = odd_observer("llama4_text", routers=routers)
    stats = run_odd(model, observer, 2)
    assert stats.absent == (
        "norm_sum", "norm_sq_sum", "max_abs", "output_sum", "sampled_tokens", "sampled_output_sum",
        "sampled_output_gram", "sampled_output_cosine_sum",
    )  # fmt: skip
    assert (stats.layers["margin_sum"] > 0).all(), "the best two logits are chosen"
    assert (stats.experts["token_gated_norm_sum"] > 0).all()
    np.testing.assert_allclose(
        np.sqrt((stats.more["gated_output_sum"] ** 2).sum(-1)) <= stats.experts["gated_norm_sum"][0] * (1 + 1e-6), True
    )


def test_llama4_tokens_are_weighed_by_the_sum_of_their_contributions():
    """Its experts return one row an expert and token, which the layer adds up."""
    routers = tuple(path.replace("experts", "router") for path in PATHS["llama4_text"])
    model, observer = odd_observer("llama4_text", routers=routers)
    rows, streams, outputs = random_rows("text"), [], []
    norm = model.get_submodule("model.layers.0.post_attention_layernorm")
    hooks = [
        norm.register_forward_pre_hook(lambda module, args: streams.append(args[0].reshape(-1, 32).double())),
        model.get_submodule(PATHS["llama4_text"][0]).register_forward_hook(
            lambda module, args, output: outputs.append(output.reshape(NUM_EXPERTS, -1, 32).double())
        ),
    ]
    with torch.inference_mode():
        model(rows.ids)
    for hook in hooks:
        hook.remove()
    ((stream,), (each,)) = streams, outputs
    expected = np.zeros(NUM_EXPERTS)
    for token, x in enumerate(stream):
        after = x + each[:, token].sum(0)
        turned = 1 - float(x @ after / (x.norm() * after.norm()))
        expected += turned * each[:, token].norm(dim=-1).numpy()
    stats = run_odd(model, observer, 2)
    np.testing.assert_allclose(stats.experts["token_gated_norm_sum"][0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("dbrx", "no norm beside the experts' module"),
        ("longcat_flash", "a shortcut joins later"),
        ("zaya", "the stream is scaled"),
        ("gemma4_text", "a norm after the experts"),
        ("deepseek_v4", "several streams"),
    ],
)
def test_a_stream_that_the_experts_do_not_simply_join_is_not_guessed(model_type, reason):
    model, observer = odd_observer(model_type, routers=None)
    stats = run_odd(model, observer, len(PATHS[model_type]))
    assert "token_gated_norm_sum" in stats.absent, reason
    assert "token_gated_norm_sum" not in stats.experts


def test_routers_that_return_no_logits_lack_what_needs_them():
    class Scores(torch.nn.Module):
        """The router, but of its outputs the logits are scores."""

        def __init__(self, router):
            super().__init__()
            self.router = router

        def forward(self, hidden):
            logits, weights, ids = self.router(hidden)
            return logits.sigmoid(), weights, ids

    model = build("qwen3_moe")
    block = model.get_submodule("model.layers.2.mlp")
    block.gate = Scores(block.gate)
    stats = observe_all(model, random_rows("text"), statistics="merge")
    assert stats.absent == ("margin_sum", "logit_sum", "logit_gram")


def test_the_cost_is_known_before_the_run():
    """DeepSeek-V3: 58 layers of 256 experts, hidden states of 7168."""
    model = facts(num_layers=58, num_experts=256, top_k=8)
    cost = cost_of("merge", model, hidden=7168, domains=3)
    assert cost["largest"] == 58 * 256 * 7168 * 8 == 851_443_712
    assert cost["bytes"] - 2 * cost["largest"] < 250e6
    assert cost_of("standard", model, hidden=7168, domains=3)["bytes"] < 10e6
    assert cost["reservoir_bytes"] == cost["extra_expert_tokens"] == 0
    full = cost_of("full", model, hidden=7168, domains=3, sampled=4096, reservoir=True)
    assert full["reservoir_bytes"] == 58 * 4096 * 7168 * 2
    assert full["extra_expert_tokens"] == 58 * 4096 * 256


@pytest.mark.parametrize("statistics", LEVELS)
def test_the_cost_is_that_of_the_arrays(statistics):
    model, rows = build("deepseek_v3"), [random_rows("a"), random_rows("b")]
    stats = observe_all(model, *rows, statistics=statistics, sample=TokenSample(rows, tokens=5))
    arrays = dict(stats.arrays())
    tokens = arrays.pop("tokens").nbytes + arrays.pop("halves.tokens").nbytes
    assert tokens == 2 * 8 * 3
    assert (
        sum(array.nbytes for array in arrays.values())
        == cost_of(statistics, stats.model, hidden=32, domains=2)["bytes"]
    )


def test_every_quantity_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    assert [name for name in QUANTITIES if f"`{name}`" not in text] == []


def test_every_quantity_says_what_it_is():
    for quantity in TABLE:
        assert quantity.meaning and quantity.level in LEVELS and quantity.kind in ("sum", "max")
        assert math.prod(quantity.shape(facts(), domains=2, hidden=32)) > 0
