"""What the observer must find, computed slowly: one token, one expert, one plain float64 product at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.data import Rows
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.stats import EXPERT_SUMS, Stats
from tests.models import VOCAB

EXPERTS = EXPERT_SUMS.keys() - {"token_gated_norm_sum"}
"""What can be told without the residual stream; :mod:`tests.calibrate.reference_more` has the rest."""

Formula = Callable[[nn.Module, int, Tensor], Tensor]
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


FORMULAS: dict[str, Formula] = {"gpt_oss": gpt_oss}


def formula_of(model: PreTrainedModel) -> Formula:
    return FORMULAS.get(model.config.model_type, gated_silu)


def experts_of(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(layer.experts for layer in derive_anatomy(model.config).layers)


class SlowSums:
    """What experts and weights tell: the sums of :data:`EXPERTS`, (layers, experts), and the entropy, (layers,)."""

    def __init__(self, num_layers: int, num_experts: int):
        self.experts = {name: np.zeros((num_layers, num_experts)) for name in EXPERTS}
        self.layers = {"gate_entropy_sum": np.zeros(num_layers)}

    def add(self, layer: int, slots: Iterable[tuple[int, float, Tensor | None]]) -> None:
        """One token: each expert that it uses, its weight and its unweighted output; None for no expert."""
        slots = list(slots)
        for expert, gate, output in slots:
            if output is None or gate == 0:
                continue
            norm = float((output * output).sum().sqrt())
            at = layer, expert
            self.experts["count"][at] += 1
            self.experts["gate_sum"][at] += gate
            self.experts["norm_sum"][at] += norm
            self.experts["norm_sq_sum"][at] += norm * norm
            self.experts["gated_norm_sum"][at] += abs(gate) * norm
            self.experts["gated_norm_sq_sum"][at] += (gate * norm) ** 2
            self.experts["max_abs"][at] = max(self.experts["max_abs"][at], float(output.abs().max()))
        total = sum(abs(gate) for _, gate, _ in slots)
        shares = [abs(gate) / total for _, gate, _ in slots if gate != 0]
        self.layers["gate_entropy_sum"][layer] -= sum(share * math.log(share) for share in shares)


@contextmanager
def recording(model: PreTrainedModel, paths: Sequence[str] | None = None) -> Iterator[list[list[Call]]]:
    """The inputs of every experts module, by layer and call."""
    paths = paths or experts_of(model)
    calls: list[list[Call]] = [[] for _ in paths]
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, into=into: into.append(tuple(tensor.clone() for tensor in args))
        )
        for path, into in zip(paths, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def slow_sums(
    model: PreTrainedModel,
    calls: list[list[Call]],
    masks: list[Tensor],
    *,
    paths: Sequence[str] | None = None,
    num_experts: int | None = None,
    run: Formula | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every expert sum, (layers, experts), and every layer sum, (layers,), of the recorded calls.

    Args:
        model: The model.
        calls: What :func:`recording` gave.
        masks: For each call which tokens count.
        paths: The experts modules; by default those of the anatomy.
        num_experts: Experts a layer; ids beyond are none.
        run: What an expert computes.
    """
    run = run or formula_of(model)
    modules = [model.get_submodule(path) for path in paths or experts_of(model)]
    num_experts = num_experts or modules[0].num_experts
    sums = SlowSums(len(modules), num_experts)
    for layer, module in enumerate(modules):
        for (hidden, ids, weights), mask in zip(calls[layer], masks, strict=bool(calls[layer])):
            hidden = hidden.reshape(-1, hidden.shape[-1])
            for token in mask.reshape(-1).nonzero().reshape(-1).tolist():
                slots = zip(ids[token].tolist(), weights[token].double().tolist(), strict=True)
                x = hidden[token].double()
                sums.add(layer, [(e, gate, run(module, e, x) if e < num_experts else None) for e, gate in slots])
    return sums.experts, sums.layers


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
    assert stats.experts.keys() == other.experts.keys()
    for name in stats.experts:
        np.testing.assert_allclose(stats.experts[name], other.experts[name], rtol=rtol, err_msg=name)
    assert stats.layers.keys() == other.layers.keys() and stats.more.keys() == other.more.keys()
    for name in [*stats.layers, *stats.more]:
        mine, others = stats.group(name)[name], other.group(name)[name]
        np.testing.assert_allclose(mine, others, rtol=rtol, atol=rtol * np.abs(others).max(), err_msg=name)
