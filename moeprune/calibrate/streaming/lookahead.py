"""In which order a model calls its layers, and which layers read what an earlier one returned.

Found on a few tokens with layers that compute nothing: what one of them returns is marked, and wherever the mark turns
up in the arguments of another, that one reads it. In most models a layer's output is read by the next layer alone; some
pass the outputs of certain layers to many later ones (the encoder of an encoder-decoder, residual streams of blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune.calibrate.streaming.replay import Replay, Result, reads_placeholder
from moeprune.calibrate.streaming.tree import leaves, mapped, poisoned


@dataclass(frozen=True)
class Schedule:
    """The layers of a forward pass.

    Attributes:
        order: Their paths in the order of the calls.
        last_reader: For each position the last position that reads its output; ``len(order)`` is what follows the
            layers.
    """

    order: tuple[str, ...]
    last_reader: tuple[int, ...]


def look_ahead(replay: Replay, forward: Callable[[], Any], *, template: Any) -> Schedule:
    """Find the order of the layers and who reads whose output.

    Args:
        replay: The model, its layers wrapped.
        forward: Runs it on a few tokens. What is read after the last layer can be seen only if it returns the result.
        template: What its first layer returned for these tokens.
    """
    replay.run(forward, wanted=None, instead=lambda position, args, kwargs: Result(_imitated(template, args, kwargs)))
    order = tuple(replay.called)
    readers = []
    for marked in range(len(order)):
        reader = marked + 1

        def instead(position: int, args: Any, kwargs: Any, marked: int = marked) -> Result:
            nonlocal reader
            if position > marked and reads_placeholder((args, kwargs)):
                reader = max(reader, position)
            output = _imitated(template, args, kwargs)
            return Result(mapped(output, poisoned) if position == marked else output)

        returned: list[Any] = []
        replay.run(lambda kept=returned: kept.append(forward()), wanted=None, instead=instead)
        readers.append(len(order) if reads_placeholder(returned) else reader)
    return Schedule(order, tuple(readers))


def _imitated(template: Any, args: Any, kwargs: Any) -> Any:
    """A nest like ``template``, of ones and zeros, whose first tensor has the shape of the first argument."""
    first: Tensor = next(leaves((args, kwargs)))
    begun = False

    def imitate(tensor: Tensor) -> Tensor:
        nonlocal begun
        shape = tensor.shape if begun else first.shape
        begun = True
        full = torch.ones if tensor.dtype.is_floating_point else torch.zeros
        return full(shape, dtype=tensor.dtype, device=tensor.device)

    return mapped(template, imitate)
