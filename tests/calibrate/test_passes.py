"""One pass over several domains: what is summed, what is kept apart, what is refused."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.data import Rows
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.passes import collect_stats
from moeprune.errors import StatsError, UnsupportedModelError
from tests.calibrate.reference import assert_close, experts_of, observe, random_rows
from tests.models import build


@pytest.fixture(scope="module")
def model():
    return build("glm4_moe")


def test_right_padding_is_not_counted(model):
    """The padded last row must give what the same text without padding gives."""
    rows = random_rows("text", rows=3, length=11, padding=5)
    whole = Rows("text", rows.ids[:2], rows.mask[:2])
    rest = Rows("text", rows.ids[2:, :6], rows.mask[2:, :6])
    padded = observe(model, rows, batch_size=3)
    apart = [observe(model, part) for part in (whole, rest)]
    assert padded.tokens.tolist() == [28]
    assert (padded.experts["count"].sum(-1) == 28 * 3).all()
    np.testing.assert_array_equal(padded.experts["count"], sum(part.experts["count"] for part in apart))
    for name in padded.experts.keys() - {"max_abs"}:
        np.testing.assert_allclose(padded.experts[name], sum(part.experts[name] for part in apart), rtol=1e-5)
    np.testing.assert_allclose(
        padded.experts["max_abs"], np.maximum(*(part.experts["max_abs"] for part in apart)), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_change_the_sums(model, batch_size):
    """Matrix products of other heights may round differently in float32; nothing else may differ."""
    rows = random_rows("text", rows=5, padding=3)
    assert_close(observe(model, rows, batch_size=batch_size), observe(model, rows, batch_size=5), rtol=1e-5)


def test_two_runs_give_the_same_bits(model):
    rows = random_rows("text", rows=5, padding=3)
    assert_close(observe(model, rows), observe(model, rows), rtol=0)


def test_domains_are_kept_apart(model):
    first, second = random_rows("first"), random_rows("second", rows=4, seed=1)
    both = observe(model, first, second)
    assert both.domains == ("first", "second")
    assert both.tokens.tolist() == [33, 44]
    for at, rows in enumerate((first, second)):
        alone = observe(model, rows)
        for name, array in both.experts.items():
            np.testing.assert_array_equal(array[at], alone.experts[name][0], err_msg=name)
        np.testing.assert_array_equal(both.layers["gate_entropy_sum"][at], alone.layers["gate_entropy_sum"][0])


def test_the_run_is_recorded_with_its_time(model):
    anatomy = derive_anatomy(model.config)
    stats = collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="tiny", fingerprint="0"), domains=[random_rows("text")],
        quiet=True, run={"seed": 3},
    )  # fmt: skip
    (run,) = stats.runs
    assert run["seed"] == 3 and run["seconds"] >= 0


def test_the_vocabulary_logits_are_not_computed(model):
    calls = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args))
    rows = random_rows("text")
    run_decoder(model, rows)
    hook.remove()
    assert not calls


def test_nan_weights_are_refused_with_their_layer_and_expert():
    model = build("mixtral")
    with torch.no_grad():
        model.get_submodule(experts_of(model)[-1]).down_proj[4, 3, 2] = float("nan")
    with pytest.raises(StatsError) as error:
        observe(model, random_rows("code"))
    assert str(error.value) == (
        "calibration: norm_sum of model.layers.1 expert 4 in domain 'code' is nan. "
        "The model overflows on this text; calibrate in another dtype."
    )


def test_float16_overflow_is_refused():
    model = build("mixtral", dtype=torch.float16)
    with torch.no_grad():
        model.get_submodule(experts_of(model)[-1]).down_proj[2].fill_(60000.0)
    with pytest.raises(StatsError, match=r"model\.layers\.1 expert 2 in domain 'text' is (inf|nan)"):
        observe(model, random_rows("text"))


def test_a_model_that_denoises_a_canvas_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.config, "canvas_length", 256, raising=False)
    rows = random_rows("text")
    with pytest.raises(UnsupportedModelError, match=r"^Glm4MoeForCausalLM denoises a canvas of random tokens"):
        run_decoder(model, rows)


def test_of_several_models_in_one_the_first_reads(model):
    class Several(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.thinker, self.talker = model, build("mixtral")

    calls = []
    hook = model.base_model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    rows = random_rows("text")
    run_decoder(Several(), rows)
    hook.remove()
    assert calls[0]["input_ids"].tolist() == rows.ids.tolist()
