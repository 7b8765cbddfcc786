"""What a decoder layer takes and returns, as tensors in a nest of tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# A number that no index of a model is: where it turns up, a placeholder was read.
POISON = -(2**31) + 12_345


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a nest, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The nest with every tensor replaced; dictionaries become plain ones.

    Raises:
        TypeError: If something in the nest is neither a tensor, a plain value nor a nest.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is not a value that a decoder layer is known to return")


def poisoned(tensor: Tensor, *, device: torch.device | None = None) -> Tensor:
    """A tensor of the same shape that takes no memory and marks whatever is computed from it."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        value: Any = float("nan")
    else:
        value = True if tensor.dtype == torch.bool else POISON
    return torch.full((), value, dtype=tensor.dtype, device=device or tensor.device).expand(tensor.shape)


def is_poisoned(tensor: Tensor) -> bool:
    """Whether a placeholder of :func:`poisoned` went into a tensor; booleans do not tell."""
    if tensor.device.type == "meta" or tensor.dtype == torch.bool:
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().any())
    return bool((tensor == POISON).any())
