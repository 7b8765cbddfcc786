"""What the observer must find, computed slowly: one token, one expert, one plain float64 product at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.data import Rows
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.stats import EXPERT_SUMS, LAYER_SUMS, Stats
from tests.models import VOCAB

Call = tuple[Tensor, Tensor, Tensor]
"""Hidden states, (tokens, hidden); expert ids, (tokens, top_k); weights, (tokens, top_k)."""


def gated_silu(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    gate, up = (module.gate_up_proj[expert].double() @ x).tensor_split(2)
    return module.down_proj[expert].double() @ (gate / (1 + torch.exp(-gate)) * up)


def gpt_oss(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    both = x @ module.gate_up_proj[expert].double() + module.gate_up_proj_bias[expert].double()
    gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    return inner @ module.down_proj[expert].double() + module.down_proj_bias[expert].double()


def formula_of(model: PreTrainedModel) -> Callable[[nn.Module, int, Tensor], Tensor]:
    return gpt_oss if model.config.model_type == "gpt_oss" else gated_silu


def experts_of(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(layer.experts for layer in derive_anatomy(model.config).layers)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[list[Call]]]:
    """The inputs of every experts module, by layer and call."""
    calls: list[list[Call]] = [[] for _ in experts_of(model)]
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, into=into: into.append(tuple(tensor.clone() for tensor in args))
        )
        for path, into in zip(experts_of(model), calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def slow_sums(
    model: PreTrainedModel, calls: list[list[Call]], masks: list[Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every expert sum, (layers, experts), and every layer sum, (layers,), of the recorded calls.

    Args:
        model: The model.
        calls: What :func:`recording` gave.
        masks: For each call which tokens count.
    """
    run = formula_of(model)
    modules = [model.get_submodule(path) for path in experts_of(model)]
    experts = {name: np.zeros((len(modules), modules[0].num_experts)) for name in EXPERT_SUMS}
    layers = {name: np.zeros(len(modules)) for name in LAYER_SUMS}
    for layer, module in enumerate(modules):
        for (hidden, ids, weights), mask in zip(calls[layer], masks, strict=True):
            for token in mask.reshape(-1).nonzero().reshape(-1).tolist():
                gates = weights[token].double()
                for expert, gate in zip(ids[token].tolist(), gates.tolist(), strict=True):
                    output = run(module, expert, hidden[token].double())
                    norm = float((output * output).sum().sqrt())
                    at = layer, expert
                    experts["count"][at] += 1
                    experts["gate_sum"][at] += gate
                    experts["norm_sum"][at] += norm
                    experts["norm_sq_sum"][at] += norm * norm
                    experts["gated_norm_sum"][at] += gate * norm
                    experts["max_abs"][at] = max(experts["max_abs"][at], float(output.abs().max()))
                share = (gates / gates.sum()).numpy()
                layers["gate_entropy_sum"][layer] += -(share * np.log(share)).sum()
    return experts, layers


def random_rows(domain: str, *, rows: int = 3, length: int = 11, padding: int = 0, seed: int = 0) -> Rows:
    """Random tokens; the last ``padding`` of the last row are padding."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padding:
        ids[-1, -padding:] = 2
        mask[-1, -padding:] = False
    return Rows(domain, ids, mask)


def observe(model: PreTrainedModel, *domains: Rows, batch_size: int = 2) -> Stats:
    anatomy = derive_anatomy(model.config)
    return collect_stats(
        model, anatomy=anatomy, facts=anatomy.facts(name="tiny", fingerprint="f" * 64), domains=domains,
        batch_size=batch_size, quiet=True,
    )  # fmt: skip


def assert_close(stats: Stats, other: Stats, *, rtol: float) -> None:
    """Same counts, and sums that agree to ``rtol``."""
    assert stats.domains == other.domains
    np.testing.assert_array_equal(stats.tokens, other.tokens)
    np.testing.assert_array_equal(stats.experts["count"], other.experts["count"])
    for name in EXPERT_SUMS:
        np.testing.assert_allclose(stats.experts[name], other.experts[name], rtol=rtol, err_msg=name)
    for name in LAYER_SUMS:
        np.testing.assert_allclose(stats.layers[name], other.layers[name], rtol=rtol, err_msg=name)
