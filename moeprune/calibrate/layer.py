"""Observing one layer: its experts, its router and the residual stream, and the sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from moeprune.calibrate.all_experts import SampleAccumulator
from moeprune.calibrate.beside import Logits, Residual
from moeprune.calibrate.experts.seen import Kind, Seen
from moeprune.calibrate.merge_sums import MergeAccumulator
from moeprune.calibrate.quantities import QUANTITIES, at_level
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.sums import LayerAccumulator, chosen_experts, rows_of, turn

LOGITS = frozenset({"margin_sum", "logit_sum", "logit_gram"})
SAMPLED = frozenset(name for name, quantity in QUANTITIES.items() if quantity.level == "full")
TURNED = "token_gated_norm_sum"


@dataclass(frozen=True)
class Batch:
    """What is known of the tokens of a forward pass; None where nothing is.

    Attributes:
        mask: True for text.
        odd: True for tokens of odd rows.
        sampled: Which tokens belong to the sample.
        slots: Place in the sample of each of those; always on the CPU.
    """

    mask: Bool[Tensor, " tokens"] | None = None
    odd: Bool[Tensor, " tokens"] | None = None
    sampled: Int[Tensor, " sampled"] | None = None
    slots: Int[Tensor, " sampled"] | None = None

    def on(self, device: torch.device) -> Batch:
        """The same on the device of a layer; no mask where all is text."""
        mask = None if self.mask is None or bool(self.mask.all()) else self.mask.to(device)
        odd = None if self.odd is None else self.odd.to(device)
        sampled = None if self.sampled is None else self.sampled.to(device)
        return Batch(mask, odd, sampled, self.slots)


class LayerObserver:
    """Sums of one layer since :meth:`start`.

    Attributes:
        called: Whether the model ran it.
        told_apart: Whether even and odd rows were told apart in every call.
        given: The quantities that every call gave.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        experts: str,
        router: str | None,
        kind: Kind,
        num_experts: int,
        merge: bool,
        keep: Callable[[Tensor, Tensor], None] | None,
    ):
        self._module = model.get_submodule(experts)
        self._parent = model.get_submodule(experts.rpartition(".")[0])
        self._router = None if router is None else model.get_submodule(router)
        self._kind = kind
        self._num_experts = num_experts
        self._merge = merge
        self._keep = keep
        self._logits = Logits(num_experts)
        self._residual = Residual(model, experts)
        self._held: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin with sums of zero."""
        self._sums: LayerAccumulator | None = None
        self._pairs: MergeAccumulator | None = None
        self._sample: SampleAccumulator | None = None
        self._pending = False
        self._tokens = 0
        self.told_apart = True
        self.given = self.quantities

    @property
    def called(self) -> bool:
        """Whether the model ran the layer since :meth:`start`."""
        return self._sums is not None

    @property
    def quantities(self) -> frozenset[str]:
        """What the layer can give, as far as its modules tell."""
        names = self._kind.quantities
        if self._router is None:
            names -= LOGITS
        return names if self._residual.known else names - {TURNED}

    @contextmanager
    def watching(self, report: Callable[[Seen], None]) -> Iterator[None]:
        """Report every call inside the block."""
        with ExitStack() as stack:
            if self._router is not None:
                stack.enter_context(self._logits.watching(self._router))
            stack.enter_context(self._residual.watching())
            stack.enter_context(self._kind.watch(self._module, self._parent, report))
            if self._residual.known:
                stack.callback(self._module.register_forward_hook(self._combined).remove)
            yield

    def add(self, seen: Seen, batch: Batch) -> None:
        """Add a call of the experts."""
        tokens, device = seen.weights.shape[0], seen.gates.device
        self.settle()
        self._tokens = tokens
        # Made here, because only here it is known where the layer runs: its weights may be offloaded between calls.
        self._sums = sums = self._sums or LayerAccumulator(self._num_experts, device)
        self.told_apart &= batch.odd is not None
        logits = None if self._router is None else self._logits.take(tokens)
        if logits is None:
            self.given -= LOGITS
        chosen = chosen_experts(seen, self._num_experts) if self._merge or logits is not None else None
        if self._merge:
            assert chosen is not None
            self._pairs = pairs = self._pairs or MergeAccumulator(self._num_experts, device)
            pairs.begin(seen, batch.mask)
            sums.add(seen, batch.mask, batch.odd, visit=pairs.visit)
            pairs.end()
            pairs.add_pairs(chosen, logits, batch.mask)
        else:
            sums.add(seen, batch.mask, batch.odd)
        sums.add_tokens(seen.weights, batch.mask, batch.odd)
        if logits is not None and chosen is not None:
            sums.add_margin(logits, chosen, batch.mask)
        self._add_sample(seen, batch)
        self._pending = TURNED in self.given

    def _add_sample(self, seen: Seen, batch: Batch) -> None:
        if batch.sampled is None or batch.slots is None or seen.inputs is None:
            self.given -= SAMPLED
            return
        if not len(batch.slots):
            return
        inputs = seen.inputs[batch.sampled]
        if self._keep is not None:
            self._keep(batch.slots, inputs)
        if self._kind.run_all is not None:
            run_all = self._kind.run_all
            self._sample = self._sample or SampleAccumulator(self._num_experts, seen.gates.device)
            self._sample.add(inputs, lambda part: run_all(self._module, part))

    def _combined(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """The experts have returned: weigh the call that they reported by how far its tokens were turned."""
        if not self._pending or self._sums is None or not isinstance(output, Tensor):
            return
        with torch.no_grad():
            tokens = self._tokens
            stream = self._residual.take(tokens)
            if stream is not None and output.numel() % stream.numel() == 0:
                self._sums.add_token_weighted(turn(stream, rows_of(output, tokens)))
                self._pending = False

    def settle(self) -> None:
        """End a call: where its tokens could not be weighed, the sum has a gap and is none."""
        if self._pending or not self._residual.known:
            self.given -= {TURNED}

    def sums(self) -> dict[str, Tensor]:
        """The sums since :meth:`start`, float64, where they were made; those of even and odd rows, and ``tokens``."""
        assert self._sums is not None
        whole = self._sums.whole() | (self._pairs.whole() if self._pairs else {})
        whole |= self._sample.whole() if self._sample else {}
        return self._sums.halved() | {"tokens": self._sums.tokens} | whole

    def hold(self, stats: Stats, sums: Mapping[str, Tensor], *, layer: int) -> None:
        """Add sums over hidden states where they are; :meth:`collect` brings them to ``stats``."""
        for name, tensor in sums.items():
            if not self._is_wanted(stats, name, tensor):
                continue
            if name not in self._held:  # the same additions in the same order, also in a run that goes on
                self._held[name] = torch.from_numpy(stats.group(name)[name][layer]).to(tensor.device, copy=True)
            self._held[name] += tensor

    def collect(self, stats: Stats, *, layer: int) -> None:
        """Write to ``stats`` the sums that were held."""
        for name, tensor in self._held.items():
            if name in stats.group(name):
                stats.group(name)[name][layer] = tensor.cpu().numpy()

    def add_to(self, stats: Stats, sums: Mapping[str, np.ndarray], *, domain: int, layer: int) -> None:
        """Add sums to ``stats``, whose arrays decide what is added."""
        for name, array in sums.items():
            if name == "tokens":
                continue
            if QUANTITIES[name].halved:
                self._add_halved(stats, name, array, at=(domain, layer))
            elif self._is_wanted(stats, name, array):
                into, axes = stats.group(name)[name], QUANTITIES[name].axes
                at: tuple[Any, ...] = (domain, layer) if "domains" in axes else (layer,)
                if "ranks" in axes:  # a call may have more or fewer weights a token than the model's top-k
                    array = array[: into.shape[2]]
                    at = (*at, slice(len(array)))
                into[at] += array

    def _is_wanted(self, stats: Stats, name: str, array: Tensor | np.ndarray) -> bool:
        """Whether ``stats`` has a place for a sum; for one over hidden states it is made here, as its size is known."""
        if name not in self.given or name not in at_level(stats.statistics):
            return False
        if name not in stats.group(name) and "hidden" in QUANTITIES[name].axes:
            stats.group(name)[name] = np.zeros((len(stats.model.layers), *array.shape))
        return name in stats.group(name)  # another layer may lack it

    def _add_halved(self, stats: Stats, name: str, array: np.ndarray, *, at: tuple[int, int]) -> None:
        if name not in stats.experts:
            return
        maximum = QUANTITIES[name].kind == "max"
        if stats.halves:
            into = stats.halves[name][:, at[0], at[1]]
            into[:] = np.maximum(into, array) if maximum else into + array
        else:
            whole = stats.experts[name][at]
            whole[:] = np.maximum(whole, array.max(0)) if maximum else whole + array.sum(0)
