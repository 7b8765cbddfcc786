import copy
import math
import statistics

import pytest
import torch

from moeprune.errors import EvaluationError
from moeprune.evaluate.divergence import divergence


@pytest.fixture(scope="module")
def rows(tokenizer):
    return torch.randint(len(tokenizer), (5, 7), generator=torch.Generator().manual_seed(4))


def slow(model, reference, rows):
    """Sums in Python floats, one position and one token of the vocabulary at a time."""
    kl, agreement = [], []
    for row in rows:
        with torch.no_grad():
            q = model(row[None]).logits[0].double().log_softmax(-1).tolist()
            p = reference(row[None]).logits[0].double().log_softmax(-1).tolist()
        kl.append(
            sum(math.exp(a) * (a - b) for ps, qs in zip(p, q, strict=True) for a, b in zip(ps, qs, strict=True)) / 7
        )
        agreement.append(sum(ps.index(max(ps)) == qs.index(max(qs)) for ps, qs in zip(p, q, strict=True)) / 7)
    return kl, agreement


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_it_is_the_slow_formula_for_any_batch_size(model, rows, batch_size):
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.model.layers[1].mlp.gate.weight.add_(0.05)
        near.model.layers[0].mlp.experts.down_proj.mul_(0.7)
    kl, agreement = slow(near, model, rows)
    result = divergence(near, model, rows=rows, batch_size=batch_size)
    assert 0 < statistics.mean(agreement) < 1
    assert result["kl"]["value"] == pytest.approx(statistics.mean(kl), rel=1e-4)
    assert result["kl"]["stderr"] == pytest.approx(statistics.stdev(kl) / math.sqrt(5), rel=1e-4)
    assert result["top1_agreement"]["value"] == pytest.approx(statistics.mean(agreement))
    assert result["top1_agreement"]["stderr"] == pytest.approx(statistics.stdev(agreement) / math.sqrt(5))
    assert (result["kl"]["n"], result["tokens"]) == (5, 35)


def test_the_direction_is_from_the_reference(model, other_model, rows):
    forward = divergence(model, other_model, rows=rows, batch_size=2)["kl"]["value"]
    backward = divergence(other_model, model, rows=rows, batch_size=2)["kl"]["value"]
    assert forward == pytest.approx(statistics.mean(slow(model, other_model, rows)[0]), rel=1e-4)
    assert forward != pytest.approx(backward, rel=1e-2)


def test_a_model_does_not_diverge_from_itself_and_keeps_its_mode(model, rows):
    model.train()
    try:
        result = divergence(model, model, rows=rows[:1], batch_size=2)
        assert model.training
    finally:
        model.eval()
    assert result == {
        "kl": {"value": 0.0, "stderr": None, "n": 1},
        "top1_agreement": {"value": 1.0, "stderr": None, "n": 1},
        "tokens": 7,
    }


def test_tokens_that_neither_model_can_say_add_nothing(model, rows):
    masked = copy.deepcopy(model)
    masked.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([3]), -math.inf)
    )
    assert divergence(masked, masked, rows=rows, batch_size=5)["kl"]["value"] == 0.0


def test_what_has_no_divergence_is_refused(model, build_model, tokenizer, rows):
    with pytest.raises(EvaluationError) as error:
        divergence(build_model(0, vocab=len(tokenizer) + 3), model, rows=rows, batch_size=2)
    size = len(tokenizer)
    assert str(error.value) == (
        f"The models have vocabularies of {size + 3} and {size} tokens. "
        "Their divergence is defined only for the same vocabulary."
    )
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(EvaluationError, match="The divergence is not a number"):
        divergence(broken, model, rows=rows, batch_size=2)
    with pytest.raises(EvaluationError, match=r"got shape \(0, 7\) and batch size 2"):
        divergence(model, model, rows=rows[:0], batch_size=2)
