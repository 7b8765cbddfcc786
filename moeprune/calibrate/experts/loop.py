"""Experts as stacked weights that the class runs in a loop of its own: dbrx, longcat_flash, step3p7.

The loop runs as it is. While it does, torch's function calls are watched: a product with a slice of the last projection
gives the unweighted output of the expert that the slice belongs to. Nothing is computed twice, and no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeprune.calibrate.experts.recorded import Run, check_sum, joined, wrapped_forward
from moeprune.calibrate.experts.seen import EVERYTHING, Kind, Report, Seen, arguments, packed

LAST_PROJECTIONS = ("down_proj", "mlp.w2")
PRODUCTS = {"linear", "matmul", "mm", "__matmul__"}


def _matches(module: nn.Module) -> bool:
    return arguments(module) == ["hidden_states", "top_k_index", "top_k_weights"] and bool(_last_projection(module))


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
        self._module: Any = module
        self._name = str(_last_projection(module))
        weight = module.get_parameter(self._name)
        # A flat weight stacks the experts' rows; the class itself knows how many there are.
        self.num_experts: int = weight.shape[0] if weight.ndim == 3 else int(self._module.num_experts)
        self._size = weight.numel() // self.num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS and len(args) > 1:
            expert = self._expert_of(args[1])
            if expert is not None:
                self.runs.append((expert, result))
        return result

    def _expert_of(self, operand: Tensor) -> int | None:
        # Read anew each time: an offloaded weight is only in memory while its module runs.
        weight = self._module.get_parameter(self._name)
        if operand.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or operand.numel() != self._size:
            return None
        return (operand.storage_offset() - weight.storage_offset()) // self._size


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
    return Seen(outputs, gates, experts, order % top_k_index.shape[0], top_k_weights, inputs=hidden)


LOOP = Kind("stacked weights and a loop over the experts that are hit", EVERYTHING, _matches, _refusal, _watch)
