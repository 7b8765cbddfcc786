"""Experts as stacked weights that the class runs in a loop of its own: dbrx, longcat_flash, step3p7.

The loop runs as it is. While it does, torch's function calls are watched: a product with a slice of the last projection
gives the unweighted output of the expert that the slice belongs to. Nothing is computed twice, and no bit changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeprune.calibrate.experts.recorded import Run, check_sum, joined, wrapped_forward
from moeprune.calibrate.experts.seen import EVERYTHING, Kind, Report, Seen, packed

LAST_PROJECTIONS = ("down_proj", "mlp.w2")
PRODUCTS = {"linear", "matmul", "mm", "__matmul__"}


def _matches(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters)
    return parameters == ["hidden_states", "top_k_index", "top_k_weights"] and _last_projection(module) is not None


def _refusal(module: nn.Module) -> str | None:
    return packed(module, str(_last_projection(module)))


def _last_projection(module: nn.Module) -> str | None:
    names = {name for name, _ in module.named_parameters()}
    return next((name for name in LAST_PROJECTIONS if name in names), None)


class _Products(TorchFunctionMode):
    """Records the products of activations with single experts' slices of a stacked weight."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.runs: list[Run] = []
        weight = module.get_parameter(str(_last_projection(module)))
        # A flat weight stacks the experts' rows; the class itself knows how many there are.
        self.num_experts: int = weight.shape[0] if weight.ndim == 3 else int(module.num_experts)  # type: ignore[arg-type]
        self._size = weight.numel() // self.num_experts
        self._weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS and len(args) > 1 and self._is_slice(args[1]):
            self.runs.append(((args[1].storage_offset() - self._weight.storage_offset()) // self._size, result))
        return result

    def _is_slice(self, operand: Tensor) -> bool:
        same = operand.untyped_storage().data_ptr() == self._weight.untyped_storage().data_ptr()
        return same and operand.numel() == self._size


@contextmanager
def _watch(module: nn.Module, parent: nn.Module, report: Report) -> Iterator[None]:
    first = True

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            nonlocal first
            with _Products(module) as products:
                returned = original(hidden_states, top_k_index, top_k_weights)
            with torch.no_grad():
                flat = hidden_states.reshape(-1, hidden_states.shape[-1])
                seen = _seen(products, flat, top_k_index, top_k_weights, module)
                if first:
                    passed_on = torch.where(top_k_index < products.num_experts, 0, top_k_weights).float().sum(-1)
                    check_sum(seen, returned, module=module, beside=flat * passed_on.unsqueeze(-1))
                    first = False
                report(seen)
            return returned

        return forward

    with wrapped_forward(module, wrap):
        yield


def _seen(products: _Products, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: nn.Module) -> Seen:
    """The slots in the order of the loop: by expert, then by place in the top-k, then by token.

    Ids beyond the last projection's experts stand for no expert (longcat's pass the token through): such slots are no
    part of the statistics.
    """
    experts, order = torch.sort(top_k_index.t().reshape(-1), stable=True)
    routed = experts < products.num_experts
    experts, order = experts[routed], order[routed]
    outputs = joined(products.runs, experts=experts, hidden=hidden, module=module)
    gates = top_k_weights.t().reshape(-1)[order]
    return Seen(outputs, gates, experts, order % top_k_index.shape[0], top_k_weights)


LOOP = Kind("stacked weights and a loop over the experts that are hit", EVERYTHING, _matches, _refusal, _watch)
