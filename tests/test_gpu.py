"""What runs on an accelerator gives what runs on the CPU: ``python -m pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moeprune.anatomy.source import open_source
from moeprune.calibrate.data import Rows
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.stats import Stats
from moeprune.checkpoint.load import load_model
from moeprune.demo import MODEL_DIR
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from tests.models import VOCAB, save
from tests.pruning import random_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]


def stats_on(folder: Path, device: str) -> Stats:
    source = open_source(folder)
    ids = torch.randint(VOCAB, (6, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 20:] = False
    return collect_stats(
        load_model(folder, device=device), anatomy=source.anatomy, facts=source.facts,
        domains=[Rows("text", ids, mask)], batch_size=4, quiet=True,
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_observing_does_not_change_what_the_model_computes(dtype):
    from moeprune.calibrate.observer import Observer

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
