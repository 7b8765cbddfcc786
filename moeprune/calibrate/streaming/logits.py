"""Logits of a model that does not fit the memory, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeprune.anatomy.source import Source
from moeprune.calibrate.streaming.layers import LayerStream
from moeprune.calibrate.streaming.memory import check_layers
from moeprune.checkpoint.load import choose_device
from moeprune.plan.plan import Plan


def stream_logits(
    source: Source,
    *,
    batches: Sequence[Mapping[str, Tensor]],
    plan: Plan | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Float[Tensor, "rows tokens vocabulary"]]:
    """What the whole model would give for some batches, with two of its layers in memory at a time.

    Every parameter must be stored with the shape that the model has for it.

    Args:
        source: The checkpoint. A quantised one is dequantised layer by layer.
        batches: The model's arguments, such as ``input_ids`` (rows, tokens), int64. The first is also the one by which
            the order of the layers is found: it should be short.
        plan: Applied to the model before it runs; without it the model is as stored.
        dtype: As what weights are loaded; ``auto`` keeps the stored dtype.
        device: Where layers run.

    Raises:
        PlanError: If the plan does not fit the model.
        CheckpointError: If a parameter is not stored, or has another shape.
        RoomError: If two layers do not fit.
        UnsupportedModelError: If the model cannot be run layer by layer.
    """
    place = torch.device(choose_device(device))
    stream = LayerStream(source, dtype=dtype, device=place, plan=plan)
    forwards = [partial(_logits, stream.model, batch, place) for batch in batches]
    with torch.inference_mode(), stream.open():
        stream.plan(forwards[0])
        assert stream.schedule is not None
        order = stream.schedule.order
        sizes = [stream.weights.num_bytes(path) for path in order]
        check_layers(max(sizes), held=sizes[0], device=place)
        for position in range(len(order)):
            for _ in stream.advance(position, forwards):
                pass
            stream.tidy(position)
        return [stream.end(batch, forward) for batch, forward in enumerate(forwards)]


def _logits(model: Any, batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
    return with_head(model)(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits


def with_head(model: Any) -> Any:
    """The part of a model that turns text into logits; some models hold several that are called one by one."""
    while type(model).forward is torch.nn.Module.forward:
        model = next(iter(model.children()))  # Qwen3-Omni: the thinker, then the talker
    return model
