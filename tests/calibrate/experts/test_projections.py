"""Both mixtures of jetmoe: of feed-forward experts and of attention heads."""

import pytest
import torch

from moeprune.calibrate.experts import kind_of, observable
from moeprune.calibrate.stats import EXPERT_SUMS
from tests.calibrate.experts.models import NUM_EXPERTS, PATHS, build
from tests.calibrate.experts.observing import assert_equal_sums, observe_at, run
from tests.calibrate.reference import SlowSums, random_rows

PATH = PATHS["jetmoe"]


def route(module, x):
    """Experts and weights of one token, by hand."""
    best, experts = (module.router.layer.weight.double() @ x).topk(2)
    return experts.tolist(), best.softmax(0).tolist()


def feed_forward(module, expert, x):
    gate, up = (module.input_linear.weight[expert].double() @ x).tensor_split(2)
    return module.output_linear.weight[expert].double() @ (gate / (1 + torch.exp(-gate)) * up)


@pytest.fixture
def spied():
    """The model, and what its mixtures are given: (mixture, hidden states) and, of attention, (mixture, attended)."""
    model = build("jetmoe")
    inputs, attended = [], []
    for path in PATH:
        module = model.get_submodule(path)
        if path.endswith("mlp"):
            module.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
            continue
        map_queries, reduce = module.map, module.reduce
        module.map = lambda x, module=module, plain=map_queries: (inputs.append((module, x)), plain(x))[1]
        module.reduce = lambda x, topology, module=module, plain=reduce: (
            attended.append((module, x)), plain(x, topology),
        )[1]  # fmt: skip
    return model, inputs, attended


@torch.no_grad()
def test_both_mixtures_equal_the_slow_formula(spied):
    model, inputs, attended = spied
    rows = random_rows("text", rows=2, padding=4)
    run(model, rows)
    values = {id(module): x.double() for module, x in attended}
    sums = SlowSums(4, NUM_EXPERTS)
    for module, hidden in inputs:
        layer = PATH.index(next(path for path in PATH if model.get_submodule(path) is module))
        for row, token in rows.mask.nonzero().tolist():
            x = hidden[row, token].double()
            experts, gates = route(module, x)
            if id(module) in values:
                outputs = [
                    module.output_linear.weight[expert].double() @ values[id(module)][row, token, slot]
                    for slot, expert in enumerate(experts)
                ]
            else:
                outputs = [feed_forward(module, expert, x) for expert in experts]
            sums.add(layer, zip(experts, gates, outputs, strict=True))
    assert len(inputs) == 4 and len(values) == 2
    stats = observe_at(model, PATH, rows)
    assert_equal_sums(stats, sums.experts, sums.layers)
    assert (stats.experts["count"].sum(-1) == 18 * 2).all()


@torch.no_grad()
def test_what_is_seen_of_attention_experts_adds_up_to_what_the_mixture_returns(monkeypatch):
    """f is what an expert's own output projection gives; all g f and the bias make up the result."""
    model = build("jetmoe")
    module = model.get_submodule(PATH[0])
    returned, seen = [], []
    plain = module.reduce
    monkeypatch.setattr(module, "reduce", lambda x, topology: returned.append(plain(x, topology)) or returned[-1])
    with kind_of(module).watch(module, model.get_submodule("model.layers.0.self_attention"), seen.append):
        run(model, random_rows("text", rows=2))
    (call,), (result,) = seen, returned
    total = torch.zeros(22, 32).index_add(0, call.tokens, call.outputs * call.gates[:, None])
    torch.testing.assert_close(total + module.bias, result.view(22, 32))


def test_both_mixtures_give_every_sum():
    model = build("jetmoe")
    for path in PATH[:2]:
        observed, quantities = observable(model.get_submodule(path))
        assert observed
        assert quantities == ", ".join(EXPERT_SUMS)
