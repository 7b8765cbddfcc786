"""Which modules can be observed is known from their interface, without running them."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import use_experts_implementation

from moeprune.calibrate.experts import observable
from moeprune.calibrate.experts.loop import LOOP
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.stats import EXPERT_SUMS
from moeprune.errors import UnsupportedModelError
from tests.calibrate.experts.models import BUILDERS, CONFIGS, PATHS, build

ALL = ", ".join(EXPERT_SUMS)
CONTRIBUTIONS = "count, gate_sum, gated_norm_sum, gated_norm_sq_sum, token_gated_norm_sum"


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_models_on_the_meta_device_are_told_apart(model_type):
    with torch.device("meta"):
        builder = BUILDERS.get(model_type, transformers.AutoModelForCausalLM.from_config)
        model = builder(CONFIGS[model_type]())
    for path in PATHS[model_type]:
        observed, text = observable(model.get_submodule(path))
        assert observed == (model_type != "nllb-moe")
        if observed:
            assert text == (CONTRIBUTIONS if model_type == "llama4_text" else ALL)


def test_a_module_of_an_unknown_kind_is_named():
    observed, reason = observable(nn.Linear(3, 4))
    assert not observed
    assert reason == (
        "Linear cannot be observed: it holds experts in none of the known ways (transformers' experts interface; a "
        "ModuleDict of experts; a router between grouped projections; stacked weights and a loop over the experts that "
        "are hit; stacked weights that compute every token)."
    )


def test_the_layer_of_an_unknown_kind_is_named_before_any_pass():
    model = build("dbrx")
    with pytest.raises(
        UnsupportedModelError, match=r"^transformer\.blocks\.1\..*\.attn: DbrxAttention cannot be observed"
    ):
        Observer(model, experts=(PATHS["dbrx"][0], "transformer.blocks.1.norm_attn_norm.attn"), num_experts=6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_packed_weights_are_refused_with_the_way_out(dtype):
    for model_type in ("zaya", "step3p5"):
        module = build(model_type).get_submodule(PATHS[model_type][0])
        module.down_proj = nn.Parameter(module.down_proj.detach().to(dtype), requires_grad=False)
        observed, reason = observable(module)
        name = str(dtype).removeprefix("torch.")
        assert not observed
        assert reason.endswith(f"its weights are stored as {name}; load the model dequantised.")


def test_experts_with_an_interface_of_their_own_are_refused_with_the_way_out():
    class Quantised(type(build("zaya").get_submodule(PATHS["zaya"][0]))):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

    decorated = use_experts_implementation(Quantised, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    observed, reason = observable(decorated(CONFIGS["zaya"]()))
    assert not observed
    assert reason.endswith("it dispatches to kernels of its own for quantised weights; load the model dequantised.")


class Loop(nn.Module):
    """Experts of one matrix and a loop over them."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.down_proj = nn.Parameter(torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0)))

    def product(self, x, expert):
        return functional.linear(x, self.down_proj[expert])

    def after(self, x):
        return x

    def tokens(self, found):
        return found

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        for expert in range(4):
            place, tokens = torch.where(top_k_index.t() == expert)
            tokens = self.tokens(tokens)
            if len(tokens):
                output = self.after(self.product(hidden_states[tokens], expert)) * top_k_weights[tokens, place, None]
                final.index_add_(0, tokens, output)
        return final


class NormAfterwards(Loop):
    def after(self, x):
        return x / x.norm(dim=-1, keepdim=True)


class CopiedWeight(Loop):
    def product(self, x, expert):
        return functional.linear(x, self.down_proj[expert].clone())


class OtherTokens(Loop):
    def tokens(self, found):
        return found.flip(0)


def watch(module):
    generator = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(9, 5, generator=generator), torch.rand(9, 2, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    seen = []
    with torch.no_grad(), LOOP.watch(module, nn.Module(), seen.append):
        module(hidden, ids, weights)
    return hidden, ids, weights, seen


def test_a_loop_of_a_class_that_is_not_known_is_observed():
    module = Loop()
    assert observable(module) == (True, ALL)
    hidden, ids, weights, ((call),) = watch(module)
    assert len(call.experts) == 18
    for output, gate, expert, token in zip(call.outputs, call.gates, call.experts, call.tokens, strict=True):
        torch.testing.assert_close(output, module.down_proj[expert] @ hidden[token])
        assert gate == weights[token, ids[token].tolist().index(expert)]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NormAfterwards(), r"gate weights times expert outputs miss its result by \d+%"),
        (OtherTokens(), r"gate weights times expert outputs miss its result by \d+%"),
        (CopiedWeight(), r"its router asked for expert 0 on \d tokens, .* and 1 more, but seen was none"),
    ],
)
def test_a_loop_that_treats_its_experts_in_a_way_of_its_own_is_refused(module, reason):
    with pytest.raises(UnsupportedModelError, match=f"^{type(module).__name__} cannot be observed: {reason}"):
        watch(module)


def test_an_overflow_is_left_to_the_check_of_the_statistics():
    module = Loop()
    with torch.no_grad():
        module.down_proj[2] = float("inf")
    *_, seen = watch(module)
    assert not torch.isfinite(seen[0].outputs).all()
