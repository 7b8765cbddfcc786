"""Observing changes nothing, whatever the way in which a model holds its experts."""

import pytest
import torch
from accelerate import cpu_offload

from moeprune.calibrate.observer import Observer
from tests.calibrate.experts.models import CONFIGS, NUM_EXPERTS, PATHS, build
from tests.calibrate.experts.observing import observe_at
from tests.calibrate.reference import assert_close, random_rows

OBSERVABLE = sorted(CONFIGS.keys() - {"nllb-moe"})


def inputs(model):
    ids = random_rows("text").ids
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def marks(model):
    """All that observing could leave behind on a module or a config."""
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ], model.config._experts_implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", OBSERVABLE)
def test_observing_changes_no_bit_and_leaves_no_mark(model_type, dtype):
    model = build(model_type, dtype=dtype)
    observer = Observer(model, experts=PATHS[model_type], num_experts=NUM_EXPERTS)
    with torch.inference_mode():
        plain, before = model(**inputs(model))[0], marks(model)
        with observer.observing():
            observer.start()
            observed = model(**inputs(model))[0]
        after, again = marks(model), model(**inputs(model))[0]
    assert torch.isfinite(plain).all()
    assert torch.equal(plain, observed)
    assert torch.equal(plain, again)
    assert before == after


@pytest.mark.parametrize("model_type", ["dbrx", "switch_transformers", "jetmoe", "llama4_text", "zaya"])
def test_a_pass_that_raises_leaves_no_mark(model_type):
    model = build(model_type)
    before = marks(model)
    observer = Observer(model, experts=PATHS[model_type], num_experts=NUM_EXPERTS)
    with pytest.raises(RuntimeError, match="stop"), observer.observing():
        raise RuntimeError("stop")
    assert before == marks(model)


def test_a_forward_that_was_replaced_before_is_put_back():
    """accelerate moves weights in a forward of the instance."""
    model = build("dbrx")
    module = model.get_submodule(PATHS["dbrx"][0])
    class_forward = module.forward
    module.forward = lambda *args: class_forward(*args)
    own = module.forward
    observer = Observer(model, experts=PATHS["dbrx"], num_experts=NUM_EXPERTS)
    with torch.inference_mode(), observer.observing():
        assert module.forward is not own
        observer.start()
        model(**inputs(model))
    assert module.forward is own
    assert module.forward is not class_forward


@pytest.mark.parametrize("model_type", ["step3p5", "switch_transformers", "zaya"])
def test_offloaded_weights_are_observed(model_type):
    """Between calls they are on the meta device. accelerate itself cannot offload dbrx, jetmoe and llama4."""
    rows = random_rows("text", padding=4)
    expected = observe_at(build(model_type), PATHS[model_type], rows)
    model = cpu_offload(build(model_type), execution_device=torch.device("cpu"))
    assert next(model.get_submodule(PATHS[model_type][0]).parameters()).device.type == "meta"
    assert_close(observe_at(model, PATHS[model_type], rows), expected, rtol=0)
