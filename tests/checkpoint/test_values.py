"""Values that are no numbers are found in every dtype, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeprune.checkpoint import values
from moeprune.checkpoint.header import DTYPE_BITS, read_header
from moeprune.checkpoint.values import NOT_FINITE, check_finite
from moeprune.errors import CheckpointError

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
KEY = "model.layers.0.mlp.gate.weight"


def refusal(path, *, dim: int = 0, key: str = KEY) -> str | None:
    tensors, _ = read_header(path)
    try:
        check_finite(tensors, expert_dims={key: dim})
    except CheckpointError as error:
        return str(error)
    return None


def damaged(expert: int, element: list[int], path) -> str:
    return (
        f"{path}: expert {expert} (element {element}) of {KEY!r} is not a finite number. The model is damaged; "
        "download it again, or save it anew from where it was trained."
    )


def test_every_dtype_with_values_that_are_no_numbers_is_in_the_table():
    assert set(TORCH) == set(NOT_FINITE)
    whole_or_small = {"BOOL", "F4", "F6_E2M3", "F6_E3M2"}  # the OCP formats below a byte have neither NaN nor infinity
    assert {name for name in DTYPE_BITS if name[0] not in "UI"} - set(NOT_FINITE) == whole_or_small


@pytest.mark.parametrize("dtype", [name for name in NOT_FINITE if DTYPE_BITS[name] <= 16])
def test_every_bit_pattern_is_judged_as_torch_judges_it(tmp_path, monkeypatch, dtype):
    bits = DTYPE_BITS[dtype]
    patterns = torch.arange(1 << bits, dtype=torch.int32).to({8: torch.uint8, 16: torch.uint16}[bits])
    numbers = patterns.view(TORCH[dtype])
    finite = torch.isfinite(numbers.float())
    name, mask, pattern = NOT_FINITE[dtype]
    judged = (patterns.numpy().astype(name) & np.dtype(name).type(mask)) == pattern
    assert (judged == ~finite.numpy()).all()
    save_file({KEY: numbers[finite]}, tmp_path / "good.safetensors")
    assert refusal(tmp_path / "good.safetensors") is None
    save_file({KEY: numbers}, tmp_path / "bad.safetensors")
    first = int(torch.nonzero(~finite)[0])
    assert refusal(tmp_path / "bad.safetensors") == damaged(first, [first], tmp_path / "bad.safetensors")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_the_first_bad_value_is_found_whatever_the_chunks(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from(["F64", "F32", "BF16", "F16", "C64", "F8_E5M2"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(TORCH[dtype])
    bad = data.draw(st.lists(st.integers(0, tensor.numel() - 1), max_size=3))
    for position in bad:
        tensor.view(-1)[position] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    path = tmp_path_factory.getbasetemp() / "values.safetensors"
    save_file({"before": torch.full((3,), float("nan")), KEY: tensor, "z": torch.full((5,), float("inf"))}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "CHUNK_BYTES", data.draw(st.sampled_from([8, 24, 64, 1 << 20])))
        found = refusal(path, dim=dim)
    if not bad:
        assert found is None
    else:
        element = [int(i) for i in np.unravel_index(min(bad), shape)]
        assert found == damaged(element[dim], element, path)


def test_integers_and_empty_tensors_and_scalars_pass_or_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(
        {
            "ints": torch.tensor([-1, 2**31 - 1], dtype=torch.int32),
            "empty": torch.zeros(0, 4),
            "one": torch.tensor(2.0),
        },
        path,
    )
    assert [refusal(path, key=key) for key in ("ints", "empty", "one")] == [None] * 3
    save_file({"one": torch.tensor(float("nan"))}, path)
    assert refusal(path, key="one").startswith(f"{path}: its value of 'one' is not a finite number.")


def test_only_the_tensors_named_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({KEY: torch.zeros(4, 3), "other": torch.full((4, 3), float("nan"))}, path)
    assert refusal(path) is None
    assert refusal(path, key="other") is not None


def test_a_file_that_ends_early_or_is_gone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({KEY: torch.zeros(400, 3)}, path)
    tensors, _ = read_header(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as error:
        check_finite(tensors, expert_dims={KEY: 0})
    assert str(error.value) == f"{path}: ends inside {KEY!r}. Did another program write to it?"
    path.unlink()
    with pytest.raises(CheckpointError) as error:
        check_finite(tensors, expert_dims={KEY: 0})
    assert str(error.value) == f"{path}: cannot be read (No such file or directory)."
