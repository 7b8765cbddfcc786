"""The observer sees what the experts really do, and changes nothing."""

import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.moe import ExpertsInterface

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.experts.interface import IMPLEMENTATION
from moeprune.calibrate.experts.seen import Seen
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.sums import LayerAccumulator, chosen_experts
from tests.calibrate.reference import EXPERTS, assert_close, experts_of, observe, random_rows, recording, slow_sums
from tests.models import COMMON, FAMILIES, VOCAB, build


def observer_of(model):
    return Observer(model, experts=experts_of(model), num_experts=derive_anatomy(model.config).num_experts.value)


def assert_equals_reference(stats, calls, masks, model, *, rtol):
    experts, layers = slow_sums(model, calls, masks)
    assert experts.keys() == EXPERTS
    np.testing.assert_array_equal(stats.experts["count"][0], experts["count"])
    for name, expected in experts.items():
        np.testing.assert_allclose(stats.experts[name][0], expected, rtol=rtol, err_msg=name)
    for name, expected in layers.items():
        np.testing.assert_allclose(stats.layers[name][0], expected, rtol=rtol, err_msg=name)


def reference_calls(model, rows, batch_size):
    """Inputs of the experts in an unobserved pass, and the masks of its batches."""
    with recording(model) as calls, torch.inference_mode():
        for ids, mask in zip(rows.ids.split(batch_size), rows.mask.split(batch_size), strict=True):
            model(input_ids=ids, attention_mask=None if mask.all() else mask.long())
    return calls, list(rows.mask.split(batch_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_equals_the_slow_formula(family):
    model = build(family)
    rows = random_rows("text", padding=4)
    calls, masks = reference_calls(model, rows, batch_size=2)
    stats = observe(model, rows, batch_size=2)
    assert_equals_reference(stats, calls, masks, model, rtol=1e-5)
    assert stats.tokens.tolist() == [29]
    assert (stats.experts["count"].sum(-1) == 29 * derive_anatomy(model.config).top_k.value).all()


def test_clamped_gpt_oss_experts_are_seen_clamped():
    model = build("gpt_oss")
    with torch.no_grad():
        for path in experts_of(model):
            model.get_submodule(path).gate_up_proj.mul_(8.0)
    rows = random_rows("text")
    calls, masks = reference_calls(model, rows, batch_size=3)
    hidden, ids, _ = calls[0][0]
    module = model.get_submodule(experts_of(model)[0])
    with torch.inference_mode():
        assert (hidden[0] @ module.gate_up_proj[ids[0, 0]]).abs().max() > 7, "the clamp must matter here"
    assert_equals_reference(observe(model, rows, batch_size=3), calls, masks, model, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_observing_changes_no_bit_of_the_logits(family, dtype):
    model = build(family, dtype=dtype)
    ids = random_rows("text").ids
    with torch.inference_mode():
        plain = model(ids).logits
        observer = observer_of(model)
        with observer.observing():
            observer.start()
            observed = model(ids).logits
        again = model(ids).logits
    assert torch.equal(plain, observed)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_the_experts_implementation_is_restored(implementation):
    model = build("mixtral")
    model.set_experts_implementation(implementation)
    with observer_of(model).observing():
        assert model.config._experts_implementation == IMPLEMENTATION
    assert model.config._experts_implementation == implementation
    assert IMPLEMENTATION not in ExpertsInterface()


def test_the_experts_implementation_is_restored_when_the_pass_raises():
    model = build("mixtral")
    before = model.get_experts_implementation()
    rows = random_rows("text")
    rows.ids[1, 2] = VOCAB + 5
    with pytest.raises(IndexError):
        observe(model, rows)
    assert model.get_experts_implementation() == before
    assert IMPLEMENTATION not in ExpertsInterface()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_loaded_with_eager_experts_is_observed(family):
    model = build(family)
    model.set_experts_implementation("eager")
    rows = random_rows("text")
    calls, masks = reference_calls(model, rows, batch_size=2)
    assert_equals_reference(observe(model, rows, batch_size=2), calls, masks, model, rtol=1e-5)


ODD = {
    "odd intermediate": lambda: transformers.MixtralConfig(
        **COMMON, num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=2, intermediate_size=21,
    ),
    "odd hidden": lambda: transformers.MixtralConfig(
        **(COMMON | {"hidden_size": 36}), num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=2,
        intermediate_size=24, head_dim=8,
    ),
    "odd intermediate, transposed": lambda: transformers.GptOssConfig(
        **COMMON, num_hidden_layers=2, head_dim=8, num_local_experts=10, num_experts_per_tok=3, intermediate_size=20,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_sizes_that_the_grouped_product_refuses_in_bfloat16_are_observed(case):
    """Its operands need rows that are multiples of 16 bytes; in the transposed layout weight and input differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ODD[case](), experts_implementation="grouped_mm")
    model = model.to(torch.bfloat16).eval()
    rows = random_rows("text")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(rows.ids)
    observer = observer_of(model)
    stats = Stats.zeros(derive_anatomy(model.config).facts(name="odd", fingerprint="0"), domains=["text"])
    # The reference runs on the inputs of the observed pass: bfloat16 rounding would change the routing of another one.
    with recording(model) as calls, torch.inference_mode(), observer.observing():
        observer.start()
        model(rows.ids)
        observer.finish(stats, domain="text", tokens=rows.num_tokens)
    assert_equals_reference(stats, calls, [rows.mask], model, rtol=0.05)


def test_left_padding_is_not_counted():
    model = build("qwen3_moe")
    ids = random_rows("text", rows=2, length=9).ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4] = False
    observer = observer_of(model)
    stats = Stats.zeros(derive_anatomy(model.config).facts(name="tiny", fingerprint="0"), domains=["text"])
    with recording(model) as calls, torch.inference_mode(), observer.observing():
        observer.start()
        observer.set_mask(mask)
        model(input_ids=ids, attention_mask=mask.long())
        observer.finish(stats, domain="text", tokens=int(mask.sum()))
    assert_equals_reference(stats, calls, [mask], model, rtol=1e-5)
    assert (stats.experts["count"].sum(-1) == 14 * 3).all()


def test_overflow_in_padding_does_not_poison_the_sums():
    accumulator = LayerAccumulator(3, torch.device("cpu"))
    outputs = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    gates = torch.tensor([0.5, float("nan"), 0.25])
    keep = torch.tensor([True, False, False])
    seen = Seen(outputs, gates, torch.tensor([1, 1, 2]), torch.arange(3), gates.unsqueeze(-1))
    accumulator.add(seen, keep, None)
    accumulator.add_tokens(seen.weights, keep)
    accumulator.add_margin(outputs[:, [0, 1, 1]], chosen_experts(seen, 3), keep)
    assert accumulator.sums[:3].tolist() == [[0] * 6, [1, 0.5, 5, 25, 2.5, 6.25], [0] * 6]
    assert accumulator.max_abs[:3].tolist() == [0, 4, 0]
    assert accumulator.gate_entropy.item() == 0
    assert accumulator.margin.item() == 0
    assert accumulator.rank_gates.tolist() == [1]
    assert accumulator.ratios.sum() == 1


def test_a_mask_of_one_pass_is_not_used_for_the_next():
    model = build("mixtral")
    rows = random_rows("text", rows=2, length=7, padding=3)
    stats = observe(model, rows, random_rows("other", rows=2, length=7), batch_size=2)
    assert (stats.experts["count"].sum(-1) == [[11 * 2] * 2, [14 * 2] * 2]).all()


def test_experts_that_no_token_reached_have_zeros():
    model = build("qwen3_moe")
    stats = observe(model, random_rows("text", rows=1, length=2))
    unused = stats.experts["count"] == 0
    assert unused.sum() >= 2 * (10 - 2 * 3)
    for name, array in stats.experts.items():
        assert (array[unused] == 0).all(), name
        assert (array[~unused] > 0).all(), name


@pytest.mark.parametrize("elements", [1, 64, 100])
def test_norms_taken_in_pieces_are_those_of_the_whole(monkeypatch, elements):
    model = build("gpt_oss", dtype=torch.bfloat16)
    rows = random_rows("text")
    at_once = observe(model, rows)
    monkeypatch.setattr("moeprune.calibrate.sums.CACHE_ELEMENTS", elements)
    assert_close(observe(model, rows), at_once, rtol=1e-6)
