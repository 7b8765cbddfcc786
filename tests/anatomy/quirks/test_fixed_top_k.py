"""A top-k in the config that the model's code does not read: a plan that lowers it would promise what is not so."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.tiny import tiny_config
from moeprune.errors import PlanError
from moeprune.plan.plan import check_sizes
from tests.test_families import build


@pytest.mark.parametrize(("family", "top_k"), [("phimoe", 2), ("zaya", 1), ("switch_transformers", 1), ("nllb-moe", 2)])
def test_the_top_k_is_fixed(family, top_k):
    anatomy = derive_anatomy(tiny_config(CONFIG_MAPPING[family]))
    assert (anatomy.top_k.value, anatomy.top_k.fixed) == (top_k, True)
    assert anatomy.facts(name="m", fingerprint="f").top_k_fixed


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "mixtral", "jamba", "llama4_text"])
def test_the_top_k_is_free(family):
    assert not derive_anatomy(tiny_config(CONFIG_MAPPING[family])).top_k.fixed


def test_phimoe_uses_two_experts_whatever_its_config_says():
    model = build("phimoe")
    model.config.num_experts_per_tok = 1
    router = model.model.layers[0].mlp.router
    router.top_k = 1
    *_, indices = router(torch.randn(5, 32))
    assert indices.shape == (5, 2)


def test_a_plan_with_another_top_k_is_refused():
    facts = derive_anatomy(tiny_config(CONFIG_MAPPING["phimoe"])).facts(name="phi", fingerprint="f")
    check_sizes(facts, num_experts=8, top_k=2)
    with pytest.raises(PlanError) as error:
        check_sizes(facts, num_experts=8, top_k=1)
    assert str(error.value) == (
        "cannot use 1 active experts: phimoe uses 2 whatever its config says. Prune experts only."
    )
