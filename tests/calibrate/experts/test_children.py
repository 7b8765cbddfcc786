"""Experts as child modules, whose routers drop the tokens that are beyond an expert's capacity."""

import pytest
import torch
from torch import nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from moeprune.calibrate.experts import observable
from moeprune.calibrate.observer import Observer
from moeprune.errors import UnsupportedModelError
from tests.calibrate.experts.models import NUM_EXPERTS, PATHS, build
from tests.calibrate.experts.observing import assert_equal_sums, observe_at, run
from tests.calibrate.reference import SlowSums, random_rows, recording

SWITCH = PATHS["switch_transformers"]
SPARSE = tuple(path.removesuffix(".experts") for path in SWITCH)


def slow_switch(model, rows):
    """The sums of both sparse layers, routed by hand: the best expert, unless it had its fill in this row."""
    with recording(model, SPARSE) as calls:
        run(model, rows)
    # Encoder: the first 5 of 11 tokens. Decoder: a start token that is not counted, then the other 6.
    text = (rows.mask[:, :5], torch.cat([torch.zeros(len(rows.mask), 1, dtype=torch.bool), rows.mask[:, 5:]], dim=1))
    sums, dropped = SlowSums(2, NUM_EXPERTS), 0
    for layer, path in enumerate(SPARSE):
        block = model.get_submodule(path)
        capacity = block.router.expert_capacity
        hidden = torch.cat([call[0] for call in calls[layer]]).double()
        assert hidden.shape[:2] == text[layer].shape
        for row in range(len(hidden)):
            taken = [0] * NUM_EXPERTS
            for token, x in enumerate(hidden[row]):
                probabilities = (block.router.classifier.weight.double() @ x).softmax(0)
                expert = int(probabilities.argmax())
                taken[expert] += 1
                within = taken[expert] <= capacity
                if text[layer][row, token]:
                    dropped += not within
                    child = block.experts[f"expert_{expert}"]
                    output = child.wo.weight.double() @ (child.wi.weight.double() @ x).clamp(min=0)
                    sums.add(layer, [(expert, float(probabilities[expert]), output)] if within else [])
    return sums, dropped


@torch.no_grad()
def test_tokens_beyond_the_capacity_of_an_expert_are_not_counted():
    model = build("switch_transformers")
    rows = random_rows("text", rows=4, padding=4)
    sums, dropped = slow_switch(model, rows)
    stats = observe_at(model, SWITCH, rows)
    assert_equal_sums(stats, sums.experts, sums.layers)
    assert dropped > 0, "the capacity must matter here"
    encoder, decoder = stats.experts["count"][0].sum(-1)
    assert encoder + decoder == 40 - dropped
    assert encoder <= 20 and decoder <= 20
    assert stats.absent == ("margin_sum",), "the logits of a router that is not watched"


def test_nllb_is_refused_while_its_forward_pass_runs_other_experts_than_its_router_chose():
    """transformers makes a one-hot of what already is one: only experts 0 and 1 ever run."""
    model = build("nllb-moe")
    reason = (
        "NllbMoeExperts cannot be observed: asked to run expert 5 on 1 token, its forward pass in this version of "
        "transformers runs expert 0 on 5, expert 1 on 1, so that its statistics would not be those of the trained "
        "model."
    )
    assert observable(model.get_submodule(PATHS["nllb-moe"][0])) == (False, reason)
    with pytest.raises(UnsupportedModelError) as error:
        Observer(model, experts=PATHS["nllb-moe"], num_experts=NUM_EXPERTS)
    assert str(error.value) == f"model.encoder.layers.1.ffn.experts: {reason}"


@pytest.fixture
def mended_nllb(monkeypatch):
    """The model with a forward pass that runs what its router asks for."""

    def forward(self, hidden_states, router_mask, router_probs):
        final = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            (tokens,) = torch.where(router_mask[:, expert] > 0)
            if len(tokens):
                output = self[f"expert_{expert}"](hidden_states[tokens]) * router_probs[tokens, expert, None]
                final.index_add_(0, tokens, output * (1 - self.moe_token_dropout))
        return final

    monkeypatch.setattr(NllbMoeExperts, "forward", forward)
    return build("nllb-moe")


@torch.no_grad()
def test_nllb_weights_hold_the_factor_that_stands_for_dropout(mended_nllb):
    assert observable(mended_nllb.get_submodule(PATHS["nllb-moe"][0]))[0]
    rows = random_rows("text", rows=2, length=10)
    with recording(mended_nllb, PATHS["nllb-moe"]) as calls:
        run(mended_nllb, rows)
    sums = SlowSums(2, NUM_EXPERTS)
    for layer, path in enumerate(PATHS["nllb-moe"]):
        ((hidden, chosen, weights),) = calls[layer]
        starts = {0, 6} if layer == 1 else set()  # the decoder's first token of either row is not text
        for token in set(range(len(hidden))) - starts:
            x, expert = hidden[token].double(), int(chosen[token].argmax())
            child = mended_nllb.get_submodule(path)[f"expert_{expert}"]
            inner = (child.fc1.weight.double() @ x + child.fc1.bias.double()).clamp(min=0)
            output = child.fc2.weight.double() @ inner + child.fc2.bias.double()
            sums.add(layer, [(expert, 0.8 * float(weights[token, expert]), output)] if chosen[token].any() else [])
    assert mended_nllb.config.moe_token_dropout == 0.2
    assert_equal_sums(observe_at(mended_nllb, PATHS["nllb-moe"], rows), sums.experts, sums.layers)


class Wrong(nn.ModuleDict):
    """Sends every token to the expert after the one that was chosen."""

    def __init__(self):
        super().__init__({f"expert_{index}": nn.Linear(4, 4) for index in range(3)})

    def forward(self, hidden_states, selected_experts, routing_weights):
        chosen = selected_experts[:, 0].argmax(-1)
        return torch.cat(
            [self[f"expert_{(int(e) + 1) % 3}"](x[None]) for e, x in zip(chosen, hidden_states, strict=True)]
        )


def test_a_container_that_runs_another_expert_is_not_observable():
    observed, reason = observable(Wrong())
    assert not observed
    assert "asked to run expert 2 on 1 token" in reason and "runs expert 0 on 1" in reason
