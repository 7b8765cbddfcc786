"""Documents in one row must give what they give one by one; a model that mixes them reads padded rows instead."""

import pytest
import torch
from transformers import CONFIG_MAPPING, BartConfig, PreTrainedModel

from moeprune.anatomy.tiny import tiny_config
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.isolation import _make_attentive, check_apart, choose_packing, keeps_apart
from moeprune.calibrate.text.packing import pack
from moeprune.checkpoint.classes import model_class
from moeprune.errors import DataError, UnsupportedModelError
from tests.models import build

# One family each of plain attention, latent attention, attention with and without sliding windows.
APART = [
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "qwen2_moe",
    "gemma4_text",
    "llama4_text",
]
# Linear attention, state spaces, convolutions, compressed keys, and two that do not hand positions to the mask.
MIXING = ["qwen3_next", "granitemoehybrid", "jamba", "lfm2_moe", "kimi_linear", "gpt_oss", "afmoe"]
DOCUMENTS = [list(range(5, 12)), list(range(40, 44)), list(range(20, 33)), [7, 50, 9]]


def toy(name: str) -> PreTrainedModel:
    config = tiny_config(CONFIG_MAPPING[name])
    torch.manual_seed(0)
    model = model_class(config)._from_config(config).eval()
    _make_attentive(model)
    return model


@torch.inference_mode()
def hidden(model: PreTrainedModel, rows: Rows) -> list[torch.Tensor]:
    """The last hidden state of every document, by its first token."""
    states = model.base_model(**rows.inputs(), use_cache=False)[0]
    found = {}
    for row, state in enumerate(states):
        numbers = rows.positions[row].eq(0).cumsum(0)
        for number in numbers.unique():
            here = (numbers == number) & rows.mask[row]
            if here.any():
                found[int(rows.ids[row][here][0])] = state[here]
    return [found[document[0]] for document in DOCUMENTS]


def one_by_one(model: PreTrainedModel) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][0] for ids in DOCUMENTS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_documents_of_a_row_do_not_see_each_other(name, attention):
    model = toy(name)
    model.set_attn_implementation(attention)
    rows = pack("text", DOCUMENTS, length=16, packing="isolate", padding=2)
    assert len(rows) == 2 and not rows.mask.all(), "documents share rows, and there is padding"
    for found, expected in zip(hidden(model, rows), one_by_one(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", [*APART, *MIXING])
def test_padded_documents_give_what_they_give_one_by_one(name):
    model = toy(name)
    rows = pack("text", DOCUMENTS, length=16, packing="pad", padding=2)
    for found, expected in zip(hidden(model, rows), one_by_one(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", [*APART, *MIXING])
def test_rows_are_isolated_where_the_model_can_and_padded_where_not(name):
    config = tiny_config(CONFIG_MAPPING[name])
    assert choose_packing("auto", config=config) == ("isolate" if name in APART else "pad")
    assert choose_packing("concat", config=config) == "concat"
    assert choose_packing("pad", config=config) == "pad"


def test_isolation_is_refused_where_it_would_be_a_pretence():
    with pytest.raises(DataError) as error:
        choose_packing("isolate", config=tiny_config(CONFIG_MAPPING["qwen3_next"]))
    assert str(error.value) == (
        "--pack isolate: qwen3_next does not keep the documents of a row apart. Use --pack pad."
    )


def test_an_unknown_packing():
    with pytest.raises(DataError, match=r"unknown packing 'isolated'. Did you mean 'isolate'\?"):
        choose_packing("isolated", config=tiny_config(CONFIG_MAPPING["mixtral"]))


def test_an_encoder_decoder_reads_full_rows():
    config = BartConfig()
    assert choose_packing("auto", config=config) == "concat"
    with pytest.raises(DataError, match=r"an encoder-decoder reads halves of full rows\. Use --pack concat"):
        choose_packing("pad", config=config)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    choose_packing("auto", config=tiny_config(CONFIG_MAPPING["mixtral"]))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_asked_again(dtype):
    """Its layers may be of other kinds than the defaults of its class, in which case the toy has misled."""
    check_apart(build("glm4_moe", dtype=dtype))
    with pytest.raises(UnsupportedModelError, match=r"Qwen3NextForCausalLM does not keep .* Use --pack pad\."):
        check_apart(toy("qwen3_next").to(dtype))


def test_a_model_that_ignores_all_context_proves_nothing():
    model = toy("mixtral")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "o_proj" in name:
                tensor.zero_()
    assert not keeps_apart(model, vocab_size=90, exactly=True)
