"""llama4: every expert computes every token, and the gate multiplies its input."""

import pytest
import torch
from torch import nn

from moeprune.calibrate.experts import observable
from moeprune.calibrate.observer import Observer
from moeprune.errors import UnsupportedModelError
from tests.calibrate.experts.models import NUM_EXPERTS, PATHS, build
from tests.calibrate.experts.observing import assert_equal_sums, observe_at, run
from tests.calibrate.reference import SlowSums, random_rows, recording

PATH = PATHS["llama4_text"]
BLOCKS = tuple(path.removesuffix(".experts") for path in PATH)


def expert_output(module, expert, x):
    gate, up = (x @ module.gate_up_proj[expert].double()).tensor_split(2)
    return (up * gate / (1 + torch.exp(-gate))) @ module.down_proj[expert].double()


@torch.no_grad()
def test_only_contributions_of_chosen_experts_are_summed():
    model = build("llama4_text")
    rows = random_rows("text", padding=4)
    with recording(model, BLOCKS) as calls:
        run(model, rows)
    sums = SlowSums(2, NUM_EXPERTS)
    for layer, path in enumerate(BLOCKS):
        block = model.get_submodule(path)
        hidden = torch.cat([call[0].reshape(-1, 32) for call in calls[layer]]).double()
        for token in rows.mask.reshape(-1).nonzero().reshape(-1).tolist():
            best, experts = (block.router.weight.double() @ hidden[token]).topk(2)
            slots = []
            for expert, gate in zip(experts.tolist(), best.sigmoid().tolist(), strict=True):
                # Divided by the gate, because the sum multiplies the norm with it: what is left is |f(g x)|.
                slots.append((expert, gate, expert_output(block.experts, expert, gate * hidden[token]) / gate))
            sums.add(layer, slots)
    stats = observe_at(model, PATH, rows)
    assert_equal_sums(stats, sums.experts, sums.layers)
    assert (stats.experts["count"].sum(-1) == 29 * 2).all()


def test_norms_of_the_unweighted_output_are_absent_and_not_zero():
    model = build("llama4_text")
    stats = observe_at(model, PATH, random_rows("text"))
    given = ["count", "gate_sum", "gated_norm_sum", "gated_norm_sq_sum", "token_gated_norm_sum"]
    assert list(stats.experts) == given
    assert stats.absent == ("norm_sum", "norm_sq_sum", "max_abs", "margin_sum")
    assert observable(model.get_submodule(PATH[0])) == (True, ", ".join(given))


def test_dense_experts_without_a_router_beside_them_are_refused():
    model = build("llama4_text")
    experts = model.get_submodule(PATH[0])
    model.lonely = nn.ModuleDict({"experts": experts})
    observer = Observer(model, experts=("lonely.experts",), num_experts=NUM_EXPERTS)
    with pytest.raises(UnsupportedModelError, match="ModuleDict, which calls it, has no router"), observer.observing():
        pass
