"""See what every routed expert does, in the forward pass that the model does anyway.

The observer sees the model's real selection and weights, whatever its router does. No expert runs on a token that the
model would not have run it on, except on the sample of level ``full``, and no bit of the model's results changes. How
this is done depends on the way in which a module holds its experts; :mod:`moeprune.calibrate.experts` has one file for
each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from moeprune.anatomy.anatomy import Anatomy
from moeprune.calibrate.experts import kind_of
from moeprune.calibrate.experts.seen import Kind, Seen
from moeprune.calibrate.layer import Batch, LayerObserver
from moeprune.calibrate.quantities import QUANTITIES, at_level
from moeprune.calibrate.reservoir import Reservoir
from moeprune.calibrate.sample import TokenSample
from moeprune.calibrate.stats import Stats
from moeprune.calibrate.transfer import to_host
from moeprune.errors import UnsupportedModelError
from moeprune.facts import ModelFacts


class Observer:
    """Collects statistics while a model runs.

    Args:
        model: The model, in memory.
        experts: Path of each MoE layer's experts module, in the order of the statistics' layers.
        num_experts: Routed experts a layer.
        routers: Path of each layer's router, whose logits some quantities need; without them these are absent.
        statistics: The level (:data:`moeprune.calibrate.quantities.LEVELS`).
        sample: The tokens that all experts are run on at level ``full``; without it what needs them is absent.
        reservoir: Where the inputs of all layers are kept for the tokens of the sample.

    Raises:
        UnsupportedModelError: If the experts of a layer cannot be observed, naming layer, class and reason.
        StatsError: If there is no such level.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        experts: tuple[str, ...],
        num_experts: int,
        routers: tuple[str, ...] | None = None,
        statistics: str = "standard",
        sample: TokenSample | None = None,
        reservoir: Reservoir | None = None,
    ):
        self.statistics = statistics
        self._names = set(at_level(statistics))
        self._sample = sample if statistics == "full" else None
        self._paths = experts
        self._batches: dict[bool, Batch] = {}
        self._placed: dict[tuple[bool, torch.device], Batch] = {}
        self._domain: str | None = None
        self._lacking: set[str] = set()
        encoder: set[int] = set()
        if model.config.is_encoder_decoder:
            encoder = {id(module) for module in model.get_encoder().modules()}
        self._in_encoder = [id(model.get_submodule(path)) in encoder for path in experts]
        self._layers = [
            LayerObserver(
                model,
                experts=path,
                router=routers[layer] if routers is not None else None,
                kind=_kind_at(model, path),
                num_experts=num_experts,
                merge=statistics != "standard",
                keep=partial(reservoir.write, layer) if reservoir is not None and self._sample else None,
            )
            for layer, path in enumerate(experts)
        ]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        statistics: str = "standard",
        sample: TokenSample | None = None,
        reservoir: Reservoir | None = None,
    ) -> Observer:
        """An observer of all layers of a model, its routers included."""
        return cls(
            model,
            experts=tuple(layer.experts for layer in anatomy.layers),
            num_experts=anatomy.num_experts.value,
            routers=tuple(layer.router for layer in anatomy.layers),
            statistics=statistics,
            sample=sample,
            reservoir=reservoir,
        )

    @property
    def quantities(self) -> tuple[str, ...]:
        """The quantities of the level that this model gives in every layer, as far as can be told before it runs."""
        given = self._names - self._lacking
        for layer in self._layers:
            given &= layer.quantities
        if self._sample is None:
            given = {name for name in given if QUANTITIES[name].level != "full"}
        return tuple(name for name in QUANTITIES if name in given)

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """Observe the model's experts inside the block, and leave them as they were afterwards."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.enter_context(layer.watching(partial(self._add, index)))
            yield self

    def zeros(self, model: ModelFacts, *, domains: Sequence[str]) -> Stats:
        """Statistics of no text, to which :meth:`finish` adds."""
        return Stats.zeros(model, domains=domains, sums=self.quantities, statistics=self.statistics, halves=True)

    def start(self, domain: str | None = None) -> None:
        """Begin a domain with sums of zero; its name is needed where tokens are sampled."""
        self._domain = domain
        for layer in self._layers:
            layer.start()

    def set_mask(
        self,
        mask: Bool[Tensor, "batch length"] | None,
        *,
        encoder: Bool[Tensor, "batch source"] | None = None,
        rows: Sequence[int] | Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Say which tokens of the next forward pass are text and which are padding.

        Args:
            mask: True for text; None means that all are, and that experts may be given a part of the tokens.
            encoder: The same of the encoder's input, for models that have one.
            rows: Number of each row of the batch, counted over the whole text of the domain, whatever this rank runs
                of it. Without them even and odd rows are not told apart, and nothing is sampled.
        """
        numbers = None if rows is None else torch.as_tensor(rows, dtype=torch.long)
        self._batches = {
            in_encoder: self._batch(given, numbers) for in_encoder, given in ((False, mask), (True, encoder))
        }
        self._placed = {}

    def finish(self, stats: Stats, *, domain: str, tokens: int, hold: bool = False) -> None:
        """Add the sums since :meth:`start` to ``stats`` under ``domain``; ``tokens`` of text were run.

        With ``hold``, sums over hidden states, the largest by far, stay on the accelerators of their layers until
        :meth:`collect`: those of a model with 58 layers, 256 experts and a hidden size of 7168 are 1.7 GB.

        A layer that the model did not call, such as the vision experts of a model that was given text alone, adds
        nothing. What a layer turns out not to give is taken out of ``stats``.
        """
        called = [index for index, layer in enumerate(self._layers) if layer.called]
        assert called, "no layer was called"
        for index in called:
            self._layers[index].settle()
            self._lacking |= self._names - self._layers[index].given
        if not all(self._layers[index].told_apart for index in called):
            stats.halves.clear()
        at = stats.domains.index(domain)
        arrays = self._brought(stats, called, hold=hold)
        for index, sums in arrays.items():
            self._layers[index].add_to(stats, sums, domain=at, layer=index)
        for name in self._lacking:
            stats.group(name).pop(name, None)
            stats.halves.pop(name, None)
        stats.tokens[at] += tokens
        if stats.halves and tokens:
            # Every layer sees every token of its half of the model once: one layer of each speaks for all.
            for place in {self._in_encoder[index]: index for index in called}.values():
                stats.halves["tokens"][:, at] += arrays[place]["tokens"]
        stats.add_up()

    def _brought(self, stats: Stats, called: Sequence[int], *, hold: bool) -> dict[int, dict[str, np.ndarray]]:
        """The sums of the layers that were called, in the memory of the host, except for those that are held."""
        here: list[tuple[int, str, Tensor]] = []
        held: list[tuple[int, dict[str, Tensor]]] = []
        for index in called:
            sums = self._layers[index].sums()
            stay = [name for name, tensor in sums.items() if hold and is_better_held(name, tensor)]
            held.append((index, {name: sums.pop(name) for name in stay}))
            here += [(index, name, tensor) for name, tensor in sums.items()]
        arrays: dict[int, dict[str, np.ndarray]] = {index: {} for index in called}
        # What a device failed at is told where its results are read first, which is before anything is added.
        for (index, name, _), array in zip(here, to_host([tensor for *_, tensor in here]), strict=True):
            arrays[index][name] = array
        for index, sums in held:
            self._layers[index].hold(stats, sums, layer=index)
        return arrays

    def collect(self, stats: Stats) -> None:
        """Write to ``stats`` what :meth:`finish` held."""
        for index, layer in enumerate(self._layers):
            layer.collect(stats, layer=index)

    def _batch(self, mask: Bool[Tensor, "batch length"] | None, rows: Int[Tensor, " batch"] | None) -> Batch:
        if mask is None:
            return Batch()
        odd = None if rows is None else (rows % 2 == 1).repeat_interleave(mask.shape[1])
        sampled = slots = None
        if self._sample is not None and rows is not None:
            assert self._domain is not None, "start() must be given the domain"
            chosen, slots = self._sample.slots(self._domain, rows, mask.shape[1])
            sampled = chosen.nonzero().squeeze(-1)
        return Batch(mask.reshape(-1), odd, sampled, slots)

    def _add(self, index: int, seen: Seen) -> None:
        batch = self._batches.get(self._in_encoder[index], Batch())
        if batch.mask is not None and batch.mask.shape[0] != seen.weights.shape[0]:
            raise UnsupportedModelError(
                f"{self._paths[index]} was given {seen.weights.shape[0]} tokens for a batch of {batch.mask.shape[0]}: "
                "this model does not run its experts on every token that it reads, once, so that its statistics would "
                "not be those of the text."
            )
        where = self._in_encoder[index], seen.gates.device
        if where not in self._placed:
            self._placed[where] = batch.on(seen.gates.device)
        self._layers[index].add(seen, self._placed[where])


def is_better_held(name: str, tensor: Tensor) -> bool:
    """Whether a sum is large and far from the memory of the host."""
    return name in QUANTITIES and "hidden" in QUANTITIES[name].axes and tensor.device.type != "cpu"


def _kind_at(model: PreTrainedModel, path: str) -> Kind:
    try:
        return kind_of(model.get_submodule(path))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
