"""Byte arithmetic against numpy."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.anatomy.roles import AllExperts, OneExpert
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import UnsupportedModelError
from moeprune.export.slices import ByteRange, OutputTensor, plan_outputs
from moeprune.facts import ModelFacts, Routing
from moeprune.plan.plan import LayerPlan, Plan

FILE = Path("x.safetensors")
WIDTHS = {"U8": np.uint8, "I16": np.int16, "F32": np.float32, "I64": np.int64}


def info(name: str, shape: tuple[int, ...], start: int = 0, *, dtype: str = "F32", file: Path = FILE) -> TensorInfo:
    return TensorInfo(name, dtype, shape, file, start, start + prod(shape) * np.dtype(WIDTHS[dtype]).itemsize)


def a_plan(keep: dict[str, tuple[int, ...]], *, num_experts: int, top_k: int = 1, mtp: str = "prune") -> Plan:
    """A plan that is not checked: layers may keep different numbers of experts."""
    facts = ModelFacts(
        name="m",
        model_type="t",
        fingerprint="f",
        layers=tuple(keep),
        num_experts=num_experts,
        top_k=2,
        routing=Routing(),
    )
    layers = tuple(LayerPlan(layer=name, keep=ids) for name, ids in keep.items())
    kept = max(map(len, keep.values()), default=0)
    return Plan(model=facts, num_experts=kept, top_k=top_k, layers=layers, mtp=mtp)


@st.composite
def selections(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...], str, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    keep = tuple(sorted(draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))))
    return shape, dim, keep, draw(st.sampled_from(sorted(WIDTHS))), draw(st.integers(0, 100))


@given(selections())
def test_a_slice_is_what_numpy_takes_along_any_axis(selection):
    shape, dim, keep, dtype, start = selection
    array = np.arange(prod(shape)).astype(WIDTHS[dtype]).reshape(shape)
    data = b"#" * start + array.tobytes() + b"#" * 7
    plan = a_plan({"layer": keep}, num_experts=shape[dim])
    (tensor,) = plan_outputs(
        {"w": info("w", shape, start, dtype=dtype)}, roles={"w": AllExperts("layer", dim)}, plan=plan
    )[FILE]
    expected = np.take(array, keep, axis=dim)
    assert b"".join(data[r.start : r.end] for r in tensor.ranges()) == expected.tobytes()
    assert tensor.num_bytes == expected.nbytes


@given(selections())
def test_slices_planned_for_a_fused_tensor_have_the_shape_that_numpy_gives(selection):
    shape, dim, keep, dtype, start = selection
    source = info("w", shape, start, dtype=dtype)
    (output,) = plan_outputs(
        {"w": source}, roles={"w": AllExperts("layer", dim)}, plan=a_plan({"layer": keep}, num_experts=shape[dim])
    )[FILE]
    assert output.shape == np.take(np.zeros(shape), keep, axis=dim).shape
    assert sum(r.end - r.start for r in output.ranges()) == output.num_bytes


def test_neighbouring_experts_are_one_range():
    tensor = OutputTensor("w", info("w", (8, 3)), (5, 3), (((0, 2), (4, 7)),))
    assert list(tensor.ranges()) == [ByteRange(FILE, 0, 24), ByteRange(FILE, 48, 84)]


def test_a_tensor_without_experts_is_one_range():
    assert list(OutputTensor("w", info("w", (8, 3), 40), (8, 3)).ranges()) == [ByteRange(FILE, 40, 136)]


def test_single_experts_are_renumbered_by_layer_and_the_pruned_ones_left_out():
    keys = {f"{layer}.experts.{i}.w": (layer, i) for layer in ("a", "b") for i in range(3)}
    tensors = {key: info(key, (2,), 8 * n) for n, key in enumerate(keys)}
    roles = {key: OneExpert(layer, i, len(layer) + 9, len(layer) + 10) for key, (layer, i) in keys.items()}
    outputs = plan_outputs(tensors, roles=roles, plan=a_plan({"a": (0, 2), "b": (1,)}, num_experts=3))[FILE]
    assert [(out.name, out.source.name) for out in outputs] == [
        ("a.experts.0.w", "a.experts.0.w"),
        ("a.experts.1.w", "a.experts.2.w"),
        ("b.experts.0.w", "b.experts.1.w"),
    ]


def test_an_expert_that_is_not_a_whole_number_of_bytes_is_refused():
    source = TensorInfo("w", "F4", (4, 3), FILE, 0, 6)
    with pytest.raises(UnsupportedModelError) as error:
        plan_outputs({"w": source}, roles={"w": AllExperts("layer", 0)}, plan=a_plan({"layer": (0, 1)}, num_experts=4))
    assert str(error.value) == "x.safetensors: an expert of 'w' (F4) is not a whole number of bytes."
