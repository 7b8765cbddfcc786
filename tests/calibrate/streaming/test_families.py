"""Every MoE type of the installed transformers, streamed: the statistics and logits of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from moeprune.anatomy.source import Source, open_source
from moeprune.calibrate.decoder import run_decoder
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.logits import stream_logits, with_head
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.checkpoint.load import load_model
from moeprune.errors import UnsupportedModelError
from tests.calibrate.streaming.both import VOCAB, assert_equal_stats, text, whole_stats
from tests.test_families import FAMILIES, build

# The others give no statistics to any pass: tests/calibrate says why.
OBSERVABLE = [name for name, family in FAMILIES.items() if not family.statistics.startswith("none")]
# Its positions of padded rows need a token id of images, which a config without images does not have.
UNPADDED = {"qwen3_omni_moe", "qwen3_omni_moe_thinker"}
# What one layer tells another besides handing on its output, in the tiny models.
LONG_RANGE = {"inkling2", "inkling2_text", "switch_transformers"}


@dataclass
class Case:
    """One type, saved as a checkpoint and loaded from it."""

    name: str
    source: Source
    model: PreTrainedModel
    rows: list[Rows]


@pytest.fixture(scope="module", params=OBSERVABLE)
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "source"
    build(request.param).save_pretrained(folder)
    rows = text(padded=request.param not in UNPADDED)
    return Case(request.param, open_source(folder), load_model(folder), rows)


def test_streamed_statistics_are_those_of_the_whole_model(case, tmp_path):
    whole = whole_stats(case.source, case.model, case.rows, statistics="merge")
    streamed = stream_stats(case.source, rows=case.rows, batch_size=2, quiet=True, statistics="merge")
    assert streamed.experts["count"].sum() > 0
    assert_equal_stats(streamed, whole)
    if case.name in (*LONG_RANGE, "qwen3_moe", "zaya"):
        offloaded = stream_stats(
            case.source, rows=case.rows, batch_size=2, quiet=True, statistics="merge", offload_hidden=tmp_path
        )
        assert_equal_stats(offloaded, streamed, rtol=0)
        assert not any(tmp_path.iterdir()), "hidden states are deleted when they are not needed any more"


def test_streamed_logits_are_those_of_the_whole_model(case):
    batches = [inputs_of(case, begin) for begin in (0, 2, 4)]
    found = stream_logits(case.source, batches=batches)
    with torch.inference_mode():
        expected = [with_head(case.model)(**batch, use_cache=False).logits for batch in batches]
    for one, other in zip(found, expected, strict=True):
        assert one.shape[-1] >= VOCAB and one.std() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def inputs_of(case: Case, begin: int) -> dict[str, torch.Tensor]:
    """Two rows of text as arguments of a model."""
    batch = case.rows[0].select(slice(begin, begin + 2))
    if case.model.config.is_encoder_decoder:
        half = batch.ids.shape[1] // 2
        return {"input_ids": batch.ids[:, :half], "decoder_input_ids": batch.ids[:, half:]}
    return batch.inputs()


def test_which_layers_read_what_an_earlier_one_returned(case):
    stream = LayerStream(case.source, dtype="auto", device=torch.device("cpu"))
    with torch.inference_mode(), stream.open():
        stream.plan(partial(run_decoder, stream.model, case.rows[1].select([0])))
    assert stream.schedule is not None
    chain = tuple(range(1, len(stream.schedule.order) + 1))
    assert (stream.schedule.last_reader != chain) == (case.name in LONG_RANGE)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(OBSERVABLE)))
def test_a_type_that_gives_no_statistics_is_refused_with_the_reason(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"cannot be observed: asked to run expert|denoises a canvas"):
        stream_stats(open_source(tmp_path), rows=text(), batch_size=2, quiet=True)
