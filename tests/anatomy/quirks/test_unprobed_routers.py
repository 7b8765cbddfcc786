"""Routers that cannot be run by themselves: a plan must say that their gate weights grow when experts go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.quirks.unprobed_routers import READ_IN_CODE
from moeprune.apply.memory import apply_plan
from moeprune.plan.uniform import make_plan
from tests.fake_stats import fake_stats
from tests.pruning import random_plan
from tests.test_families import KEEP, build, logits, text


def gates(model, path: str) -> tuple[Tensor, Tensor]:
    """Weight and id of the expert that each token chose in the router at ``path``; both choose one."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, given, answer: seen.append(answer))
    logits(model, text(3, 21))
    hook.remove()
    floats = [out.flatten() for out in seen[0] if out.is_floating_point() and out.shape[-1] == 1]
    whole = next(out for out in seen[0] if not out.is_floating_point())
    return floats[0], (whole.flatten() if whole.shape[-1] == 1 else whole.argmax(-1).flatten())


@pytest.mark.parametrize("family", READ_IN_CODE)
def test_the_weights_of_the_kept_experts_grow(family):
    """Seen in the first layer, whose router is given the same by both models."""
    model = build(family)
    for name, tensor in model.state_dict().items():
        if name.endswith("balancing_biases"):
            tensor.zero_()  # random ones are so large that all tokens choose the same
    anatomy = derive_anatomy(model.config)
    plan = random_plan(anatomy.facts(name="m", fingerprint="f"), keep=KEEP, top_k=1)
    router, keep = anatomy.layers[0].router, torch.tensor(plan.layers[0].keep)
    before, chosen = gates(model, router)
    after, now = gates(apply_plan(model, plan=plan, anatomy=anatomy), router)
    same = (before > 0) & (after > 0) & (keep[now.clamp(max=KEEP - 1)] == chosen)
    assert same.sum() >= 5
    assert (after[same] > before[same]).all()


@pytest.mark.parametrize("family", READ_IN_CODE)
def test_plans_say_so(family):
    facts = derive_anatomy(build(family).config).facts(name="m", fingerprint="f")
    plan = make_plan(fake_stats(facts), score="frequency", keep_experts=KEEP)
    warnings = " ".join(plan.warnings)
    assert "without the pruned experts the gate weights of the others grow" in warnings
    assert ("selects by a softmax over all experts plus a bias" in warnings) == (family == "zaya")
