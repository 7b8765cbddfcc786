"""All other quantities, token by token in float64: those that need the router's logits, the stream or every expert."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.observer import Observer
from moeprune.calibrate.quantities import NUM_BINS
from moeprune.calibrate.reservoir import Reservoir
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.stats import Stats
from tests.calibrate.reference import experts_of, formula_of, recording


def observe_all(
    model: PreTrainedModel,
    *domains: Rows,
    statistics: str = "standard",
    batch_size: int = 2,
    sample: TokenSample | None = None,
    reservoir: Reservoir | None = None,
    order: list[int] | None = None,
) -> Stats:
    """A plain loop over the rows, in ``order``, told of their numbers."""
    anatomy = derive_anatomy(model.config)
    observer = Observer.of(model, anatomy, statistics=statistics, sample=sample, reservoir=reservoir)
    stats = observer.zeros(anatomy.facts(name="tiny", fingerprint="f" * 64), domains=[rows.domain for rows in domains])
    with torch.inference_mode(), observer.observing():
        for rows in domains:
            observer.start(rows.domain)
            numbers = order or list(range(len(rows)))
            for begin in range(0, len(numbers), batch_size):
                picked = numbers[begin : begin + batch_size]
                part = rows.select(picked)
                observer.set_mask(part.mask, rows=picked)
                model(**part.inputs())
            observer.finish(stats, domain=rows.domain, tokens=rows.select(numbers).num_tokens)
    stats.check("test")
    return stats


@contextmanager
def recording_streams(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The residual stream before each MoE layer, by the name that all of the families give the norm that reads it."""
    streams: list[Tensor] = []
    hooks = []
    for path in experts_of(model):
        norm = model.get_submodule(path.replace("mlp.experts", "post_attention_layernorm"))
        hooks.append(norm.register_forward_pre_hook(lambda module, args: streams.append(args[0].clone())))
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def router_logits(model: PreTrainedModel, path: str, x: Tensor) -> Tensor:
    """The router's linear map, from its weights."""
    block = model.get_submodule(path.removesuffix(".experts"))
    router = getattr(block, "gate", None) or block.router
    bias = getattr(router, "bias", None)
    return router.weight.double() @ x + (0 if bias is None else bias.double())


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


@torch.inference_mode()
def slow_quantities(model: PreTrainedModel, rows: Rows, *, sampled: set[tuple[int, int]] = frozenset()) -> dict:
    """Every quantity of the table of one domain that :class:`tests.calibrate.reference.SlowSums` does not have.

    Args:
        model: A model of :data:`tests.models.FAMILIES`.
        rows: The text, run as one batch.
        sampled: Row and position of each token of the sample.
    """
    paths = experts_of(model)
    with recording(model) as calls, recording_streams(model) as streams:
        model(**rows.inputs())
    run, experts = formula_of(model), model.get_submodule(paths[0]).num_experts
    top_k = derive_anatomy(model.config).top_k.value
    shape = (len(paths), experts)
    hidden_size = calls[0][0][0].shape[-1]
    sums: dict = defaultdict(lambda: np.zeros(len(paths)))
    for name in ("token_gated_norm_sum", "logit_sum"):
        sums[name] = np.zeros(shape)
    for name in ("coactivation", "logit_gram", "sampled_output_gram", "sampled_output_cosine_sum"):
        sums[name] = np.zeros((*shape, experts))
    for name in ("output_sum", "gated_output_sum", "sampled_output_sum"):
        sums[name] = np.zeros((*shape, hidden_size))
    sums["rank_gate_sum"] = np.zeros((len(paths), top_k))
    sums["gate_ratio_count"] = np.zeros((len(paths), top_k, NUM_BINS))
    for layer, path in enumerate(paths):
        module = model.get_submodule(path)
        ((hidden, ids, weights),) = calls[layer]
        stream = streams[layer].reshape(-1, hidden_size)
        for token, counts in enumerate(rows.mask.reshape(-1).tolist()):
            if not counts:
                continue
            x, chosen = hidden[token].double(), ids[token].tolist()
            gates = weights[token].double()
            outputs = [run(module, expert, x) for expert in chosen]
            added = sum(gate * output for gate, output in zip(gates, outputs, strict=True))
            before = stream[token].double()
            turned = 1 - cosine(before, before + added)
            logits = router_logits(model, path, x)
            for expert, gate, output in zip(chosen, gates, outputs, strict=True):
                sums["token_gated_norm_sum"][layer, expert] += turned * float(gate * output.norm())
                sums["output_sum"][layer, expert] += output.numpy()
                sums["gated_output_sum"][layer, expert] += (gate * output).numpy()
                for other in chosen:
                    sums["coactivation"][layer, expert, other] += 1
            rest = [float(logits[expert]) for expert in range(experts) if expert not in chosen]
            sums["margin_sum"][layer] += min(float(logits[expert]) for expert in chosen) - max(rest)
            sums["logit_sum"][layer] += logits.numpy()
            sums["logit_gram"][layer] += np.outer(logits, logits)
            ranked = sorted(weights[token].float().tolist(), reverse=True)
            for rank, gate in enumerate(ranked):
                sums["rank_gate_sum"][layer, rank] += gate / sum(ranked)
                ratio = np.float32(gate) / np.float32(ranked[0])
                sums["gate_ratio_count"][layer, rank, min(math.floor(ratio * NUM_BINS), NUM_BINS - 1)] += 1
            if divmod(token, rows.ids.shape[1]) in sampled:
                every = torch.stack([run(module, expert, x) for expert in range(experts)])
                sums["sampled_tokens"][layer] += 1
                sums["sampled_output_sum"][layer] += every.numpy()
                sums["sampled_output_gram"][layer] += (every @ every.T).numpy()
                unit = every / every.norm(dim=-1, keepdim=True)
                sums["sampled_output_cosine_sum"][layer] += (unit @ unit.T).numpy()
    return dict(sums)
