"""Observing a tiny model at given paths, and comparing what was seen with a slow reference."""

import numpy as np
import torch
from transformers import PreTrainedModel

from moeprune.calibrate.data import Rows
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.stats import Stats
from tests.calibrate.experts.models import NUM_EXPERTS
from tests.fake_stats import facts


def observe_at(model: PreTrainedModel, paths: tuple[str, ...], rows: Rows, *, batch_size: int = 2) -> Stats:
    observer = Observer(model, experts=paths, num_experts=NUM_EXPERTS)
    model_facts = facts(num_layers=len(paths), num_experts=NUM_EXPERTS)
    stats = Stats.zeros(model_facts, domains=[rows.domain], sums=observer.quantities)
    with torch.inference_mode(), observer.observing():
        observer.start()
        run(model, rows, observer, batch_size=batch_size)
        observer.finish(stats, domain=rows.domain, tokens=rows.num_tokens)
    return stats


def run(model: PreTrainedModel, rows: Rows, observer: Observer | None = None, *, batch_size: int = 2) -> None:
    with torch.inference_mode():
        for ids, mask in zip(rows.ids.split(batch_size), rows.mask.split(batch_size), strict=True):
            run_decoder(model, Rows(rows.domain, ids, mask), observer)


def assert_equal_sums(stats: Stats, experts: dict[str, np.ndarray], layers: dict[str, np.ndarray]) -> None:
    """Everything that ``stats`` hold equals the reference; counts exactly."""
    np.testing.assert_array_equal(stats.experts["count"][0], experts["count"])
    assert stats.experts.keys() <= experts.keys() | {"token_gated_norm_sum"}
    for name in stats.experts.keys() & experts.keys():
        np.testing.assert_allclose(stats.experts[name][0], experts[name], rtol=1e-5, atol=1e-12, err_msg=name)
    for name in layers:
        np.testing.assert_allclose(stats.layers[name][0], layers[name], rtol=1e-5, atol=1e-7, err_msg=name)
