"""What layers tell each other besides handing on their output."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from moeprune.anatomy.source import open_source
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.lookahead import look_ahead
from moeprune.calibrate.streaming.passes import stream_stats
from moeprune.calibrate.streaming.replay import Replay, Result
from moeprune.calibrate.streaming.tree import is_poisoned, mapped, poisoned
from moeprune.checkpoint.classes import model_class
from moeprune.checkpoint.load import load_model
from moeprune.errors import UnsupportedModelError
from tests.calibrate.streaming.both import assert_equal_stats, text, whole_stats
from tests.test_families import build

SIZES = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 32, "hidden_size_per_layer_input": 8,
    "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
    "sliding_window": 16, "enable_moe_block": True, "num_experts": 12, "top_k_experts": 3, "moe_intermediate_size": 24,
}  # fmt: skip


@pytest.mark.parametrize("offload", [False, True])
def test_keys_and_values_that_layers_share_through_a_dictionary(tmp_path, offload):
    """The last layers of Gemma 4 may attend with the keys of an earlier one, which they find in an argument."""
    config = CONFIG_MAPPING["gemma4_text"](
        **SIZES, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2
    )
    torch.manual_seed(0)
    model_class(config)._from_config(config).save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.model.layers[2].self_attn.is_kv_shared_layer
    hidden = tmp_path / "hidden" if offload else None
    streamed = stream_stats(source, rows=text(), batch_size=2, quiet=True, offload_hidden=hidden)
    assert_equal_stats(streamed, whole_stats(source, model, text()))


class Layer(nn.Module):
    def forward(self, hidden: Tensor, other: Any = None) -> Tensor:
        return hidden + 1 if other is None else hidden + other


class Model(nn.Module):
    """Calls its layers in another order than it holds them; each takes what ``reads`` says of earlier ones."""

    def __init__(self, order: list[int], reads: dict[int, int]):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in order)
        self.order, self.reads = order, reads

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = []
        for position, index in enumerate(self.order):
            other = outputs[self.reads[position]] if position in self.reads else None
            hidden = self.layers[index](hidden * 2, other)
            outputs.append(hidden)
        return hidden


def schedule(order: list[int], reads: dict[int, int]):
    model = Model(order, reads)
    replay = Replay(model, [f"layers.{index}" for index in range(len(order))])
    with replay.wrapped():
        return look_ahead(replay, lambda: model(torch.ones(2, 3)), template=torch.ones(2, 3))


def test_layers_are_found_in_the_order_of_their_calls():
    assert schedule([2, 0, 1], {}).order == ("layers.2", "layers.0", "layers.1")


@pytest.mark.parametrize(
    ("reads", "last_reader"), [({}, (1, 2, 3, 4)), ({3: 0}, (3, 2, 3, 4)), ({2: 0, 3: 1}, (2, 3, 3, 4))]
)
def test_the_last_reader_of_an_output(reads, last_reader):
    assert schedule([0, 1, 2, 3], reads).last_reader == last_reader


def test_a_pass_that_goes_on_from_outputs_computes_what_a_whole_one_does():
    model = Model([0, 1, 2], {2: 0})
    whole = model(torch.ones(2, 3))
    replay = Replay(model, ["layers.0", "layers.1", "layers.2"])
    outputs: list[Result] = []
    with replay.wrapped():
        for position in range(3):
            result = replay.run(
                lambda: model(torch.ones(2, 3)), wanted=position, instead=lambda at, args, kwargs: outputs[at]
            )
            assert result is not None
            outputs.append(result)
    assert outputs[-1].output.equal(whole)
    assert model(torch.ones(2, 3)).equal(whole), "the layers are as they were"


def test_a_layer_that_reads_what_was_not_kept_is_refused(tmp_path, monkeypatch):
    """The look ahead tries a few tokens; a model may do otherwise with more."""
    build("inkling2_text").save_pretrained(tmp_path)
    original = LayerStream.plan

    def plan(self, forward):
        result = original(self, forward)
        object.__setattr__(self.schedule, "last_reader", (1, 2, 3, 4))
        return result

    monkeypatch.setattr(LayerStream, "plan", plan)
    with pytest.raises(UnsupportedModelError, match=r"layers\.3 reads what an earlier layer returned.*--no-stream"):
        stream_stats(open_source(tmp_path), rows=text(), batch_size=2, quiet=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
def test_a_placeholder_is_seen_in_what_is_computed_from_it(dtype):
    value = torch.ones(2, 3, dtype=dtype)
    assert not is_poisoned(value)
    assert is_poisoned(torch.cat([value, poisoned(value)])) and poisoned(value).shape == (2, 3)
    assert poisoned(value).untyped_storage().nbytes() == dtype.itemsize


def test_a_nest_that_is_not_of_tensors_is_refused():
    with pytest.raises(TypeError, match="object is not a value that a decoder layer is known to return"):
        mapped((torch.ones(1), object()), poisoned)
