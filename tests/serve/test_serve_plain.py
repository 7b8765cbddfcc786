import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moeprune.errors import EvaluationError
from moeprune.serve.plain import measure_throughput


def build(seed: int, dtype: torch.dtype) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_local_experts=5,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype).eval()


@pytest.fixture
def calls():
    return []


@pytest.fixture
def models(calls):
    built = {"base": build(0, torch.float32), "pruned": build(1, torch.bfloat16)}
    for name, model in built.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, kwargs["input_ids"].clone())), with_kwargs=True
        )
    return built


def test_the_schema(models):
    result = measure_throughput(models, batch=3, prompt_tokens=5, new_tokens=6, repeats=4, seed=0)
    assert list(result) == ["base", "pruned"]
    for rates in (result["base"].pop("prefill_tokens_per_second"), result["base"].pop("decode_tokens_per_second")):
        assert rates.keys() == {"median", "min", "max", "n"}
        assert 0 < rates["min"] <= rates["median"] <= rates["max"] and rates["n"] == 4
    assert result["base"] == {
        "engine": "transformers", "device": "cpu", "dtype": "float32", "batch": 3, "prompt_tokens": 5, "new_tokens": 6,
    }  # fmt: skip
    assert result["pruned"]["dtype"] == "bfloat16"


def test_models_take_turns_and_every_step_decodes_one_token(models, calls):
    measure_throughput(models, batch=3, prompt_tokens=5, new_tokens=6, repeats=2, seed=0)
    order = [name for name, ids in calls if ids.shape[1] == 5]
    assert order == ["base", "pruned"] * 3
    shapes = [tuple(ids.shape) for name, ids in calls if name == "base"]
    assert shapes == [(3, 5)] + [(3, 1)] * 4 + ([(3, 5)] + [(3, 1)] * 6) * 2


def test_prompts_are_those_of_the_seed_and_steps_are_greedy(models, calls):
    measure_throughput({"base": models["base"]}, batch=2, prompt_tokens=5, new_tokens=6, repeats=1, seed=7)
    run = [ids for _, ids in calls][-7:]
    assert torch.equal(run[0], torch.randint(53, (2, 5), generator=torch.Generator().manual_seed(7)))
    sequence = run[0]
    for token in run[1:]:
        with torch.no_grad():
            expected = models["base"].forward(input_ids=sequence).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token, expected)
        sequence = torch.cat([sequence, token], dim=1)


def test_the_training_flag_is_restored(models):
    models["base"].train()
    measure_throughput(models, batch=1, prompt_tokens=2, new_tokens=1, repeats=1, seed=0)
    assert models["base"].training and not models["pruned"].training


def test_sizes_below_one_are_refused(models):
    with pytest.raises(EvaluationError) as error:
        measure_throughput(models, new_tokens=0, seed=0)
    assert str(error.value) == "Expected new_tokens of at least 1 for measuring throughput, got 0."
