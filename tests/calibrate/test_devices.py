"""Calibration on an accelerator, as far as it can be told without one: where things are, and what waits for what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.sums import norms_and_peaks
from moeprune.calibrate.transfer import at_once, to_host
from moeprune.errors import RoomError
from tests.calibrate.reference import random_rows
from tests.calibrate.test_resume import assert_same_bits, at_batch, batches_run, fail, run
from tests.models import build


@pytest.fixture
def held(monkeypatch):
    """Sums over hidden states are held as if the CPU were an accelerator; this is the number of those held."""
    calls = []

    def is_better_held(name, tensor):
        calls.append(name)
        return name in ("output_sum", "gated_output_sum", "sampled_output_sum")

    monkeypatch.setattr("moeprune.calibrate.observer.is_better_held", is_better_held)
    return calls


@pytest.mark.parametrize("statistics", ["standard", "merge"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_no_layer_waits_for_its_device(family, statistics, monkeypatch):
    """The meta device has no values, so that whatever looks at one fails there; what mixes it with the CPU fails, too.

    Two things are looked at once, in the first call: whether logits are logits, and whether the residual stream is one.
    """
    monkeypatch.setattr("moeprune.calibrate.beside._adds_up", lambda *tensors: True)
    model: Any = build(family)
    anatomy = derive_anatomy(model.config)
    model.set_attn_implementation("eager")
    model.to("meta", torch.bfloat16)
    observer = Observer.of(model, anatomy, statistics=statistics)
    for layer in observer._layers:
        layer._logits._tried, layer._logits._place = True, 0
    rows = random_rows("text", rows=4, padding=3)
    seen = torch.zeros(4, 1, *(2 * [rows.ids.shape[1]]), dtype=torch.bfloat16, device="meta")  # the model's own mask
    with torch.inference_mode(), observer.observing():
        observer.start("text")
        for _ in range(2):
            observer.set_mask(rows.mask, rows=range(4))
            model.base_model(input_ids=rows.ids.to("meta"), attention_mask=seen, use_cache=False)
    for layer in observer._layers:
        assert {tensor.device.type for tensor in layer.sums().values()} == {"meta"}
        assert {tensor.dtype for tensor in layer.sums().values()} == {torch.float64}


def test_a_batch_is_brought_to_a_device_once_for_all_of_its_layers(monkeypatch):
    from moeprune.calibrate.layer import Batch

    calls, original = [], Batch.on
    monkeypatch.setattr(Batch, "on", lambda self, device: calls.append(device) or original(self, device))
    run(build("glm4_moe"), statistics="standard")
    assert len(calls) == 5  # batches; two layers have experts


def test_norms_of_half_precision_are_those_of_float32():
    """An accelerator widens values while it reads them; the result is that of a copy in float32."""
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    norms, peaks = norms_and_peaks(values)
    widened = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    torch.testing.assert_close(widened, norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.maximum(values.amax(-1), -values.amin(-1)).float(), peaks, rtol=0, atol=0)


def test_one_transfer_brings_arrays_of_all_shapes():
    tensors = [torch.randn(size, dtype=torch.float64) for size in [(3, 4), (), (2, 0), (5,)]]
    for brought in (at_once(tensors), to_host(tensors)):
        for array, tensor in zip(brought, tensors, strict=True):
            np.testing.assert_array_equal(array, tensor.numpy())


def test_sums_that_are_held_on_devices_are_those_that_are_not(held, monkeypatch):
    found = run(build("glm4_moe"), statistics="full")
    assert "gated_output_sum" in held
    monkeypatch.undo()
    assert_same_bits(found, run(build("glm4_moe"), statistics="full"))


@pytest.mark.parametrize("every", [0, 3600])
def test_a_run_that_failed_keeps_the_sums_that_were_held(held, tmp_path, every):
    model = build("glm4_moe")
    unbroken = run(model)
    hook = at_batch(model, 4, fail)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        run(model, tmp_path, every=every)
    hook.remove()
    calls = batches_run(model)
    assert_same_bits(run(model, tmp_path), unbroken)
    assert len(calls) == 2


def test_sums_of_a_batch_that_were_added_in_part_are_not_kept(tmp_path, monkeypatch):
    """Going on from them would count the batch once more."""
    model = build("glm4_moe")
    unbroken = run(model)
    original, finished = Observer.finish, []

    def finish(self, stats, **options):
        finished.append(None)
        original(self, stats, **options)
        if len(finished) == 3:
            raise RuntimeError("the GPU fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(Observer, "finish", finish)
        with pytest.raises(RuntimeError, match="fell off the bus"):
            run(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert_same_bits(run(model, tmp_path), unbroken)


def test_a_device_that_fails_while_sums_are_saved_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def collect(self, stats):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = build("glm4_moe")
    at_batch(model, 4, fail)
    monkeypatch.setattr(Observer, "collect", collect)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        run(model, tmp_path)


def test_a_gpu_without_memory_for_a_batch_is_told_with_what_helps(tmp_path):
    def overflow():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    model = build("glm4_moe")
    at_batch(model, 4, overflow)
    with pytest.raises(RoomError, match=r"^the GPU has no memory left for batches of 2 rows\. Give a smaller --batch-"):
        run(model, tmp_path)
    assert (tmp_path / "rank-0-of-1.safetensors").is_file()
