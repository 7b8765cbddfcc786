"""The sample of tokens is a matter of the text alone, and the kept inputs are those of its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from moeprune.calibrate.reservoir import Reservoir, read_inputs
from moeprune.calibrate.sample import TokenSample
from moeprune.errors import StatsError
from tests.calibrate.reference import random_rows, recording
from tests.calibrate.reference_more import observe_all
from tests.fake_stats import facts
from tests.models import build

DOMAINS = [random_rows("code", rows=9, padding=4), random_rows("math", rows=5, seed=1)]


def places(sample):
    return list(zip(sample.domain.tolist(), sample.row.tolist(), sample.position.tolist(), strict=True))


def test_as_many_different_tokens_as_asked_for_and_no_padding():
    sample = TokenSample(DOMAINS, tokens=60)
    assert sample.num_tokens == len(set(places(sample))) == 60
    assert all(DOMAINS[domain].mask[row, position] for domain, row, position in places(sample))
    assert places(sample) == sorted(places(sample)), "stored in the order of the text"


def test_all_tokens_where_there_are_fewer():
    assert TokenSample(DOMAINS, tokens=10**6).num_tokens == sum(rows.num_tokens for rows in DOMAINS)


def test_a_larger_sample_holds_the_smaller_one():
    small, large = (TokenSample(DOMAINS, tokens=tokens) for tokens in (20, 40))
    assert set(places(small)) < set(places(large))


def test_every_domain_and_row_has_its_share():
    sample = TokenSample([random_rows("text", rows=500, length=20)], tokens=1000)
    assert abs((sample.row < 250).sum() - 500) < 80
    assert abs((sample.position < 10).sum() - 500) < 80
    counts = np.bincount(sample.row, minlength=500)
    assert counts.var() < 4, "binomial: 1.8"


def test_another_seed_is_another_sample():
    assert places(TokenSample(DOMAINS, tokens=20)) != places(TokenSample(DOMAINS, tokens=20, seed=1))


def make(path, domains, *, tokens=12, fresh=True, model=None):
    sample = TokenSample(domains, tokens=tokens)
    return sample, Reservoir(path, model or facts(), sample=sample, hidden=32, fresh=fresh)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_kept_inputs_are_those_of_the_layers(tmp_path, batch_size):
    model, path = build("qwen3_moe"), tmp_path / "inputs.safetensors"
    sample, reservoir = make(path, DOMAINS)
    observe_all(model, *DOMAINS, statistics="full", sample=sample, reservoir=reservoir, batch_size=batch_size)
    reservoir.close()
    for layer in range(2):
        kept = read_inputs(path, facts(), layer=layer)
        assert kept.dtype == torch.bfloat16 and kept.shape == (12, 32)
        for slot, (domain, row, position) in enumerate(places(sample)):
            rows = DOMAINS[domain].select([row])
            with recording(model) as calls, torch.inference_mode():
                model(**rows.inputs())
            torch.testing.assert_close(kept[slot].float(), calls[layer][0][0][position], rtol=0.01, atol=1e-4)


def test_two_processes_write_one_file(tmp_path):
    model, path, rows = build("mixtral"), tmp_path / "inputs", DOMAINS[0]
    sample, whole = make(tmp_path / "whole", [rows])
    observe_all(model, rows, statistics="full", sample=sample, reservoir=whole, batch_size=1)
    whole.close()
    for fresh, order in ((True, [0, 3, 4, 8]), (False, [1, 2, 5, 6, 7])):
        _, part = make(path, [rows], fresh=fresh)
        observe_all(model, rows, statistics="full", sample=sample, reservoir=part, batch_size=1, order=order)
        part.close()
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_file_says_which_tokens_it_holds(tmp_path):
    sample, reservoir = make(tmp_path / "inputs", DOMAINS)
    reservoir.close()
    with safe_open(tmp_path / "inputs", framework="numpy") as file:
        found = list(zip(*(file.get_tensor(name).tolist() for name in ("domain", "row", "position")), strict=True))
    assert found == places(sample)


def test_inputs_of_another_model_or_sample_are_refused(tmp_path):
    path = tmp_path / "inputs"
    make(path, DOMAINS)[1].close()
    with pytest.raises(StatsError, match="layer inputs of another model or another sample"):
        make(path, DOMAINS, tokens=13, fresh=False)
    with pytest.raises(StatsError, match="layer inputs of tiny, not of other"):
        read_inputs(path, facts(name="other", fingerprint="cd" * 32), layer=0)
    with pytest.raises(StatsError, match="no such file of layer inputs"):
        read_inputs(tmp_path / "none", facts(), layer=0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StatsError, match="not a complete file of layer inputs"):
        read_inputs(path, facts(), layer=0)
