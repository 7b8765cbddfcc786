"""What runs on an accelerator gives what runs on the CPU: ``python -m pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.calibrate.data import Rows
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.reservoir import read_inputs
from moeprune.calibrate.resume import Partial
from moeprune.calibrate.stats import Stats, kind_of
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.checkpoint.load import load_model
from moeprune.demo import MODEL_DIR
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from tests.models import VOCAB, save
from tests.pruning import random_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]


def text(rows: int = 6) -> Rows:
    ids = torch.randint(VOCAB, (rows, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 20:] = False
    return Rows("text", ids, mask)


def stats_on(folder: Path, device: str, **options: Any) -> Stats:
    source = open_source(folder)
    return collect_stats(
        load_model(folder, device=device), anatomy=source.anatomy, facts=source.facts, domains=[text()], batch_size=4,
        quiet=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "mixtral"])
def test_statistics_are_those_of_the_cpu(tmp_path, family):
    folder = save(family, tmp_path)
    cpu, gpu = stats_on(folder, "cpu"), stats_on(folder, "cuda")
    # A near tie between experts may fall the other way, for a token or two.
    assert np.abs(cpu.experts["count"] - gpu.experts["count"]).sum() <= 4
    assert cpu.experts["count"].sum() == gpu.experts["count"].sum()
    for name in ("norm_sum", "gated_norm_sum", "gate_sum"):
        np.testing.assert_allclose(gpu.experts[name].sum(), cpu.experts[name].sum(), rtol=1e-3)


def assert_near(found: Stats, expected: Stats) -> None:
    """Sums over all experts: a near tie between two may fall the other way, for a token or two."""
    arrays = dict(found.arrays())
    assert arrays.keys() == dict(expected.arrays()).keys()
    for name, array in expected.arrays():
        kind = np.max if kind_of(name) == "max" else np.sum
        np.testing.assert_allclose(kind(arrays[name]), kind(array), rtol=2e-2, atol=1e-3, err_msg=name)


def test_every_level_is_that_of_the_cpu_with_the_inputs_of_the_sample(tmp_path):
    """Sums over hidden states are held on the GPU until the end, and go on from what was saved."""
    folder = save("qwen3_moe", tmp_path / "model")
    cpu = stats_on(folder, "cpu", statistics="full", keep_inputs=tmp_path / "cpu")
    for name, partial in (("gpu", None), ("saved", Partial(tmp_path / "partial", {}, every=0))):
        gpu = stats_on(folder, "cuda", statistics="full", keep_inputs=tmp_path / name, partial=partial)
        assert_near(gpu, cpu)
        for layer in range(len(cpu.model.layers)):
            found, kept = (read_inputs(tmp_path / at, cpu.model, layer=layer).float() for at in (name, "cpu"))
            torch.testing.assert_close(found, kept, rtol=2e-2, atol=2e-2)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    source = open_source(save("glm4_moe", tmp_path / "model"))
    model = load_model(source.path, device="cuda")
    calls: list[None] = []

    def stop(*_: object) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("stopped")

    def run(partial: Partial | None) -> Stats:
        return collect_stats(
            model, anatomy=source.anatomy, facts=source.facts, domains=[text()], batch_size=2, quiet=True,
            statistics="merge", partial=partial,
        )  # fmt: skip

    unbroken = run(None)
    hook = model.get_submodule(source.anatomy.layers[0].experts).register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run(Partial(tmp_path / "partial", {}))
    hook.remove()
    again = dict(run(Partial(tmp_path / "partial", {})).arrays())
    for name, array in unbroken.arrays():
        np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_layer_by_layer_gives_the_sums_of_the_whole_model(tmp_path, family, offload):
    """Weights are read and brought to the GPU by another thread while the layer before them runs."""
    folder = save(family, tmp_path / "model")
    streamed = stream_stats(
        open_source(folder), rows=[text()], batch_size=4, device="cuda", quiet=True, statistics="merge",
        offload_hidden=tmp_path / "hidden" if offload else None,
    )  # fmt: skip
    whole = stats_on(folder, "cuda", statistics="merge")
    np.testing.assert_array_equal(streamed.experts["count"], whole.experts["count"])
    for name, array in whole.arrays():
        np.testing.assert_allclose(dict(streamed.arrays())[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_layer_makes_the_host_wait_no_more_often_than_it_does_unobserved():
    """torch raises where the host waits; a first batch has looked before at what must be looked at once."""
    source = open_source("demo")
    model = load_model(MODEL_DIR, dtype="bfloat16", device="cuda")
    ids = torch.randint(500, (4, 128), device="cuda")
    layer = source.anatomy.layers[0]
    experts: Any = model.get_submodule(layer.experts)
    hidden = torch.randn(512, source.anatomy.text_config.hidden_size, dtype=torch.bfloat16, device="cuda")
    chosen = torch.rand(512, source.anatomy.num_experts.value, device="cuda").topk(8, dim=-1)
    observer = Observer.of(model, source.anatomy, statistics="merge")
    with torch.inference_mode(), observer.observing():
        observer.start("text")
        observer.set_mask(torch.ones(4, 128, dtype=torch.bool), rows=range(4))
        model(input_ids=ids, use_cache=False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(hidden, chosen.indices, chosen.values.to(torch.bfloat16))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_observing_does_not_change_what_the_model_computes(dtype):
    source = open_source("demo")
    model = load_model(MODEL_DIR, dtype=dtype, device="cuda")
    ids = torch.randint(500, (4, 128), generator=torch.Generator().manual_seed(0)).cuda()
    layers = source.anatomy.layers
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        observer = Observer(
            model, experts=tuple(layer.experts for layer in layers), num_experts=source.anatomy.num_experts.value
        )
        with observer.observing():
            observer.start()
            seen = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)


def test_an_export_passes_verification_on_the_accelerator(tmp_path):
    plan = random_plan(open_source("demo").facts, keep=48, top_k=6)
    export_checkpoint("demo", plan=plan, out=tmp_path / "out", quiet=True)
    checks = verify_checkpoint(tmp_path / "out", against="demo", plan=plan, device="cuda", quiet=True)
    assert all(check.passed for check in checks), checks
