"""Bringing sums from the devices of the layers into the memory of the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Float64[ndarray, "..."]]:
    """The values of some tensors, float64, with a single transfer from each device.

    Every transfer waits for all that the device was given to do, so that one for each tensor would have it run dry
    hundreds of times a batch. Tensors on the CPU are not copied.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for at, tensor in enumerate(tensors):
        assert tensor.dtype == torch.float64
        places.setdefault(tensor.device, []).append(at)
    for device, here in places.items():
        own = [tensors[at] for at in here]
        arrays = [tensor.numpy() for tensor in own] if device.type == "cpu" else at_once(own)
        for at, array in zip(here, arrays, strict=True):
            found[at] = array
    return found


def at_once(tensors: Sequence[Tensor]) -> list[Float64[ndarray, "..."]]:
    """The values of tensors of one device, with a single transfer."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).numpy() for part, tensor in zip(parts, tensors, strict=True)]
