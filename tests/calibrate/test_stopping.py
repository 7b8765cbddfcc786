"""A pass ends after the last layer with experts, and changes no sum by that."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn

from moeprune.calibrate.stopping import EarlyStop
from tests.calibrate.reference import assert_close, observe, random_rows
from tests.models import COMMON, build


@pytest.fixture(scope="module")
def model():
    """Experts in layers 0 and 2; layers 1, 3 and 4 are dense."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **COMMON, num_hidden_layers=5, head_dim=8, num_experts=10, num_experts_per_tok=3, moe_intermediate_size=24,
        intermediate_size=44, mlp_only_layers=[1, 3, 4],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def calls_of(module: nn.Module) -> list[None]:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_layers_after_the_last_one_with_experts_run_in_the_first_batch_only(model):
    """The first batch shows where the last layer with experts is; five batches follow."""
    layers = [calls_of(layer) for layer in model.model.layers]
    norm, head = calls_of(model.model.norm), calls_of(model.lm_head)
    observe(model, random_rows("text", rows=12, padding=3), batch_size=2)
    assert [len(calls) for calls in layers] == [6, 6, 6, 1, 1]
    assert len(norm) == 1
    assert len(head) == 0


def test_the_sums_are_those_of_full_passes(model, monkeypatch):
    rows = random_rows("text", rows=7, padding=3)
    stopped = observe(model, rows)
    monkeypatch.setattr(EarlyStop, "run", lambda self, forward: forward())
    assert_close(stopped, observe(model, rows), rtol=0)


def test_the_model_is_as_it_was(model):
    ids = random_rows("text").ids
    before = model(ids).logits
    observe(model, random_rows("text", rows=6))
    assert torch.equal(model(ids).logits, before)
    assert not any(layer._forward_hooks for layer in build("qwen3_moe").model.layers)


class Steps(nn.Module):
    """Calls its layers in any order."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.ended = 0

    def forward(self, order):
        for number in order:
            self.layers[number](torch.zeros(1))
        self.ended += 1


@contextmanager
def stopping(steps: Steps):
    stop = EarlyStop(steps, layers=["layers.0", "layers.1"])
    with stop.watching():
        yield lambda order: stop.run(lambda: steps(order))


def test_a_layer_that_is_called_twice_is_called_twice():
    steps = Steps()
    calls = calls_of(steps.layers[1])
    with stopping(steps) as run:
        run([0, 1, 0, 1, 2])
        run([0, 1, 0, 1, 2])
    assert len(calls) == 4
    assert steps.ended == 1


def test_a_pass_that_takes_another_way_runs_to_its_end():
    steps = Steps()
    with stopping(steps) as run:
        run([0, 1, 2])
        run([1, 0, 2])
        assert steps.ended == 2
        run([1, 0, 2])
    assert steps.ended == 2


def test_outside_of_a_run_nothing_is_stopped():
    steps = Steps()
    with stopping(steps) as run:
        run([0, 1])
        steps([0, 1])
    assert steps.ended == 2
