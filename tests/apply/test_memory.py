"""A plan applied in memory, against models that were put together by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.apply.memory import apply_plan, pruned_state
from moeprune.checkpoint.load import align_memory
from moeprune.errors import PlanError
from moeprune.plan.plan import Plan
from tests.models import FAMILIES, build
from tests.pruning import COUNTS, logits, random_plan

COUNT_NAME = {
    "qwen3_moe": "num_experts", "qwen2_moe": "num_experts", "olmoe": "num_experts", "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts", "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
}  # fmt: skip
# Every tensor of the tiny models that counts experts does so on its first axis.
COUNTS_EXPERTS = re.compile(r"^(model\.layers\.\d+)\.mlp\.(experts|gate|router)\.")


def prepared(family: str, *, seed: int = 0) -> tuple[PreTrainedModel, Anatomy]:
    model = build(family, seed=seed)
    align_memory(model)
    return model, derive_anatomy(model.config)


def plan_of(anatomy: Anatomy, keep: int, top_k: int, *, seed: int = 0) -> Plan:
    return random_plan(anatomy.facts(name="tiny", fingerprint="0" * 64), keep=keep, top_k=top_k, seed=seed)


def by_hand(model: PreTrainedModel, family: str, plan: Plan) -> PreTrainedModel:
    config: PreTrainedConfig = FAMILIES[family]()
    setattr(config, COUNT_NAME[family], plan.num_experts)
    config.num_experts_per_tok = plan.top_k
    state = {}
    for name, tensor in model.state_dict().items():
        match = COUNTS_EXPERTS.match(name)
        state[name] = tensor
        if match:
            state[name] = torch.stack([tensor[expert] for expert in plan.keep[match.group(1)]])
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(state, strict=True)
    align_memory(fresh)
    return fresh.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_logits_are_those_of_a_model_sliced_by_hand(family, seed):
    model, anatomy = prepared(family)
    plan = plan_of(anatomy, *COUNTS[family], seed=seed)
    assert len({layer.keep for layer in plan.layers}) > 1, "layers must differ, or a mix-up of layers goes unseen"
    pruned = apply_plan(model, plan=plan, anatomy=anatomy)
    assert torch.equal(logits(pruned), logits(by_hand(model, family, plan)))
    assert not torch.equal(logits(pruned), logits(model))


@contextmanager
def forbidding(model: PreTrainedModel, plan: Plan, top_k: int) -> Iterator[None]:
    """Make the routers of the unpruned model unable to choose the experts that the plan drops."""
    real, handles = nn.functional.linear, []

    def hook_for(dropped: list[int]) -> tuple:
        def before(module: nn.Module, args: tuple) -> None:
            def masked(*operands: Tensor) -> Tensor:
                return real(*operands).index_fill(-1, torch.tensor(dropped), float("-inf"))

            nn.functional.linear = masked

        def after(module: nn.Module, args: tuple, output: object) -> None:
            nn.functional.linear = real

        return before, after

    for layer in derive_anatomy(model.config).layers:
        dropped = sorted(set(range(plan.model.num_experts)) - set(plan.keep[layer.name]))
        router = model.get_submodule(layer.router)
        router.top_k = top_k
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[dropped] = -1e9
        before, after = hook_for(dropped)
        handles += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]
    try:
        yield
    finally:
        nn.functional.linear = real
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_expert_is_one_that_the_router_cannot_choose(family):
    model, anatomy = prepared(family)
    plan = plan_of(anatomy, *COUNTS[family], seed=3)
    found = logits(apply_plan(model, plan=plan, anatomy=anatomy))
    original = logits(model)
    with forbidding(model, plan, plan.top_k):
        expected = logits(model)
    assert not torch.allclose(expected, original, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_stays_as_it_was(family):
    model, anatomy = prepared(family)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pruned = apply_plan(model, plan=plan_of(anatomy, *COUNTS[family]), anatomy=anatomy)
    logits(pruned)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_gives_the_original_bit_for_bit(family):
    model, anatomy = prepared(family)
    same = apply_plan(model, plan=plan_of(anatomy, anatomy.num_experts.value, anatomy.top_k.value), anatomy=anatomy)
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lower_top_k_alone(family):
    model, anatomy = prepared(family)
    plan = plan_of(anatomy, anatomy.num_experts.value, 1)
    lowered = apply_plan(model, plan=plan, anatomy=anatomy)
    assert lowered.config.num_experts_per_tok == 1
    assert torch.equal(logits(lowered), logits(by_hand(model, family, plan)))
    assert not torch.equal(logits(lowered), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_is_ready_to_use(family):
    model, anatomy = prepared(family)
    kept, top_k = COUNTS[family]
    pruned = apply_plan(model, plan=plan_of(anatomy, kept, top_k), anatomy=anatomy)
    assert type(pruned) is type(model)
    assert not pruned.training
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert not any(tensor.is_meta for tensor in [*pruned.parameters(), *pruned.buffers()])
    assert getattr(pruned.config, COUNT_NAME[family]) == kept
    assert pruned.config.num_experts_per_tok == top_k
    assert pruned.config._attn_implementation == model.config._attn_implementation
    assert pruned.get_experts_implementation() == model.get_experts_implementation()
    assert pruned.generation_config.to_dict() == model.generation_config.to_dict()
    assert pruned.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape[1] > 2


def test_tensors_without_experts_are_shared_and_not_copied():
    model, anatomy = prepared("qwen3_moe")
    pruned = apply_plan(model, plan=plan_of(anatomy, 7, 2), anatomy=anatomy)
    original = model.state_dict()
    for name, tensor in pruned.state_dict().items():
        assert (tensor.data_ptr() == original[name].data_ptr()) is (name not in anatomy.axes), name


def test_tied_embeddings_stay_tied():
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).eval()
    align_memory(model)
    anatomy = derive_anatomy(model.config)
    pruned = apply_plan(model, plan=plan_of(anatomy, 7, 2), anatomy=anatomy)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert pruned.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_two_plans_on_one_model_do_not_disturb_each_other():
    model, anatomy = prepared("glm4_moe")
    first_plan, second_plan = plan_of(anatomy, 7, 2, seed=1), plan_of(anatomy, 4, 1, seed=2)
    first = apply_plan(model, plan=first_plan, anatomy=anatomy)
    expected = logits(first)
    apply_plan(model, plan=second_plan, anatomy=anatomy)
    assert torch.equal(logits(first), expected)


def test_bfloat16_stays_bfloat16():
    model = build("deepseek_v3", dtype=torch.bfloat16)
    anatomy = derive_anatomy(model.config)
    state = pruned_state(model, plan=plan_of(anatomy, 12, 2), anatomy=anatomy)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }


def test_a_plan_for_a_model_with_other_layers_is_refused():
    model, anatomy = prepared("glm4_moe")  # experts in layers 1 and 2
    plan = renamed(plan_of(derive_anatomy(FAMILIES["olmoe"]()), 7, 2), "glm4_moe")  # experts in layers 0 and 1
    with pytest.raises(PlanError) as error:
        apply_plan(model, plan=plan, anatomy=anatomy)
    assert str(error.value) == (
        "the plan was made for a model with expert layers [model.layers.0, model.layers.1] (2), "
        "tiny has [model.layers.1, model.layers.2] (2)."
    )


def test_a_plan_for_a_model_with_more_experts_is_refused():
    model, anatomy = prepared("mixtral")
    plan = plan_of(derive_anatomy(FAMILIES["olmoe"]()), 5, 2)
    with pytest.raises(PlanError) as error:
        apply_plan(model, plan=plan, anatomy=anatomy)
    assert str(error.value) == "the plan was made for a model with model type olmoe, tiny has mixtral."
    with pytest.raises(PlanError) as error:
        apply_plan(model, plan=renamed(plan, "mixtral"), anatomy=anatomy)
    assert str(error.value) == "the plan was made for a model with experts a layer 10, tiny has 6."


def renamed(plan: Plan, model_type: str) -> Plan:
    """The same plan, said to be of another model type."""
    return plan.model_copy(update={"model": plan.model.model_copy(update={"model_type": model_type})})


def test_an_edited_plan_that_contradicts_itself_is_refused():
    model, anatomy = prepared("mixtral")
    plan = plan_of(anatomy, 4, 1)
    layers = (plan.layers[0].model_copy(update={"keep": (0, 1, 2)}), plan.layers[1])
    with pytest.raises(PlanError, match=r"^model\.layers\.0: keeps 3 experts, the plan says 4\. "):
        apply_plan(model, plan=plan.model_copy(update={"layers": layers}), anatomy=anatomy)
