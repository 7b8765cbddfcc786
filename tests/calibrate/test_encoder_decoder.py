"""An encoder-decoder reads the first half of a row and is shown the second."""

import pytest
import torch

from moeprune.calibrate.decoder import run_decoder
from moeprune.errors import UnsupportedModelError
from tests.calibrate.experts.models import PATHS, build
from tests.calibrate.experts.observing import observe_at
from tests.calibrate.reference import random_rows


@pytest.fixture
def model():
    return build("switch_transformers")


def seen_by(stack):
    calls = []
    stack.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_every_token_is_given_to_one_half_of_the_model(model):
    encoder, decoder = seen_by(model.encoder), seen_by(model.decoder)
    rows = random_rows("text", rows=2, length=11, padding=3)
    run_decoder(model, rows)
    assert encoder[0]["input_ids"].tolist() == rows.ids[:, :5].tolist()
    start = model.config.decoder_start_token_id
    assert decoder[0]["input_ids"].tolist() == [[start, *row] for row in rows.ids[:, 5:].tolist()]
    assert encoder[0]["attention_mask"] is None
    assert decoder[0]["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]


def test_a_row_that_ends_before_its_second_half_leaves_the_decoder_its_start(model):
    encoder, decoder = seen_by(model.encoder), seen_by(model.decoder)
    rows = random_rows("text", rows=2, length=11, padding=8)
    run_decoder(model, rows)
    assert encoder[0]["attention_mask"].tolist() == [[1] * 5, [1] * 3 + [0] * 2]
    assert decoder[0]["attention_mask"].tolist() == [[1] * 7, [1] + [0] * 6]


def test_the_decoder_starts_with_the_padding_token_where_the_config_names_none(model):
    decoder = seen_by(model.decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = None, 7
    rows = random_rows("text", rows=1)
    run_decoder(model, rows)
    assert decoder[0]["input_ids"][0, 0] == 7


def test_padding_and_the_start_token_are_not_counted(model):
    with torch.no_grad():
        for path in PATHS["switch_transformers"]:
            model.get_submodule(path.removesuffix(".experts")).router.expert_capacity = 99
    rows = random_rows("text", rows=3, length=11, padding=8)
    stats = observe_at(model, PATHS["switch_transformers"], rows)
    assert stats.experts["count"][0].sum(-1).tolist() == [2 * 5 + 3, 2 * 6]
    assert stats.tokens.tolist() == [25]


@pytest.mark.parametrize(("length", "start"), [(1, 0), (11, None)])
def test_what_cannot_be_split_is_refused(model, length, start):
    model.config.decoder_start_token_id = model.config.pad_token_id = start
    rows = random_rows("text", length=length)
    with pytest.raises(UnsupportedModelError) as error:
        run_decoder(model, rows)
    assert str(error.value) == (
        "SwitchTransformersForConditionalGeneration: an encoder-decoder is calibrated on rows of 2 tokens or more, "
        f"with a decoder_start_token_id in its config; got rows of {length} and the id {start}."
    )
