"""Loading is strict: what transformers only warns about is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeprune.checkpoint.load import ALIGNMENT, align_memory, choose_device, load_model, load_tokenizer
from moeprune.errors import CheckpointError, MoePruneError
from tests.models import FAMILIES, build, save
from tests.pruning import edit_tensors, logits


def error_of(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_loads_and_answers_as_the_model_that_was_saved(tmp_path, family):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    align_memory(model)
    assert torch.equal(logits(model), logits(loaded))


def test_the_stored_dtype_is_kept_and_another_can_be_asked_for(tmp_path):
    save("olmoe", tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32").dtype == torch.float32
    with pytest.raises(MoePruneError) as error:
        load_model(tmp_path, dtype="int8")
    assert str(error.value) == "unknown dtype 'int8'. Known: auto, float32, bfloat16, float16."


def test_a_missing_attention_tensor(tmp_path):
    save("mixtral", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    assert error_of(tmp_path) == f"{tmp_path}: 1 missing keys while loading: model.layers.0.self_attn.q_proj.weight ..."


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("expert", [0, 3, 5])
def test_a_missing_expert(tmp_path, family, expert):
    save(family, tmp_path)
    marker = f".experts.{expert}."

    def drop(tensors):
        del tensors[next(key for key in tensors if marker in key)]

    edit_tensors(tmp_path, drop)
    assert error_of(tmp_path).startswith(f"{tmp_path}: ")


def test_an_unexpected_tensor(tmp_path):
    save("mixtral", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(3)}))
    assert error_of(tmp_path) == f"{tmp_path}: 1 unexpected keys while loading: model.layers.0.extra.weight ..."


def test_an_expert_too_many(tmp_path):
    save("qwen3_moe", tmp_path)

    def add(tensors):
        for key in [key for key in tensors if ".experts.9." in key]:
            tensors[key.replace(".experts.9.", ".experts.10.")] = tensors[key].clone()

    edit_tensors(tmp_path, add)
    assert error_of(tmp_path).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("key", ["model.layers.1.mlp.gate.weight", "lm_head.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path, key):
    save("olmoe", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(5, 32)}))
    assert f"{tmp_path}: 1 mismatched keys while loading: ('{key}', torch.Size([5, 32])" in error_of(tmp_path)


def test_a_file_that_is_not_safetensors(tmp_path):
    save("mixtral", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert error_of(tmp_path).startswith(f"{tmp_path}: does not load: ")


def test_loading_leaves_the_logging_of_transformers_as_it_was(tmp_path):
    from transformers.utils import logging

    save("mixtral", tmp_path)
    before = logging.get_verbosity()
    load_model(tmp_path)
    assert logging.get_verbosity() == before


def odd(values: torch.Tensor) -> torch.Tensor:
    """The same values one element after an aligned address."""
    room = torch.empty(values.numel() + 1)
    room[1:] = values.flatten()
    return room[1:].view_as(values)


def test_parameters_at_odd_addresses_are_moved_and_keep_their_values():
    model = nn.Linear(5, 3)
    model.register_buffer("count", odd(torch.arange(4.0)))
    weight = model.weight.detach().clone()
    model.weight.data = odd(weight)
    assert model.weight.data_ptr() % ALIGNMENT
    address = model.bias.data_ptr()
    align_memory(model)
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.weight, weight)
    assert torch.equal(model.count, torch.arange(4.0))
    assert address % ALIGNMENT or model.bias.data_ptr() == address, "aligned tensors stay where they are"


def test_aligning_keeps_tied_parameters_tied():
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)})
    model["a"].weight.data = odd(model["a"].weight.detach())
    model["b"].weight = model["a"].weight
    align_memory(model)
    assert model["a"].weight.data_ptr() == model["b"].weight.data_ptr()


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(MoePruneError) as error:
        choose_device("cuda:1")
    assert str(error.value) == "device 'cuda:1' was asked for, but torch sees no CUDA device. Use --device cpu."


def test_a_folder_without_a_tokenizer(tmp_path):
    save("mixtral", tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: no tokenizer that transformers can load (")


def test_a_device_map_says_where_each_module_goes(tmp_path):
    folder = save("qwen3_moe", tmp_path)
    loaded = load_model(folder, device_map={"": "cpu"})
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "atuo"}, "unknown device map 'atuo'. Did you mean 'auto'?"),
        ({"device_map": "auto"}, "--device-map auto spreads a model over GPUs, but torch sees none."),
        ({"device_map": "auto", "device": "cpu"}, "--device-map auto uses all GPUs, --device cpu one."),
    ],
)
def test_a_device_map_that_cannot_be_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MoePruneError) as error:
        load_model(save("qwen3_moe", tmp_path), **options)
    assert str(error.value).startswith(message)
