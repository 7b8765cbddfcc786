"""See what every routed expert does, in the forward pass that the model does anyway.

The observer sees the model's real selection and weights, whatever its router does. No expert runs on a token that the
model would not have run it on, and no bit of the model's results changes. How this is done depends on the way in which
a module holds its experts; :mod:`moeprune.calibrate.experts` has one file for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from moeprune.calibrate.experts import kind_of
from moeprune.calibrate.experts.seen import Kind, Seen
from moeprune.calibrate.stats import EXPERT_SUMS, Stats
from moeprune.calibrate.sums import SUM_COLUMNS, LayerAccumulator
from moeprune.errors import UnsupportedModelError


class Observer:
    """Collects statistics while a model runs.

    Args:
        model: The model, in memory.
        experts: Path of each MoE layer's experts module, in the order of the statistics' layers.
        num_experts: Routed experts a layer.

    Raises:
        UnsupportedModelError: If the experts of a layer cannot be observed, naming layer, class and reason.
    """

    def __init__(self, model: PreTrainedModel, *, experts: tuple[str, ...], num_experts: int):
        self._paths = experts
        self._modules = [model.get_submodule(path) for path in experts]
        self._parents = [model.get_submodule(path.rpartition(".")[0]) for path in experts]
        self._in_encoder = [False] * len(experts)
        if model.config.is_encoder_decoder:
            encoder = {id(module) for module in model.get_encoder().modules()}
            self._in_encoder = [id(module) in encoder for module in self._modules]
        self._num_experts = num_experts
        self._masks: dict[bool, Bool[Tensor, " tokens"] | None] = {}
        self._current: list[LayerAccumulator | None] = [None] * len(experts)
        self._kinds: list[Kind] = []
        for path, module in zip(experts, self._modules, strict=True):
            try:
                self._kinds.append(kind_of(module))
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{path}: {error}") from error

    @property
    def quantities(self) -> tuple[str, ...]:
        """The names of :data:`moeprune.calibrate.stats.EXPERT_SUMS` that this model gives in every layer."""
        return tuple(name for name in EXPERT_SUMS if all(name in kind.quantities for kind in self._kinds))

    @contextmanager
    def observing(self) -> Iterator[Observer]:
        """Observe the model's experts inside the block, and leave them as they were afterwards."""
        with ExitStack() as stack:
            for layer, kind in enumerate(self._kinds):
                report = partial(self._add, layer)
                stack.enter_context(kind.watch(self._modules[layer], self._parents[layer], report))
            yield self

    def start(self) -> None:
        """Begin a domain with sums of zero."""
        self._current = [None] * len(self._modules)

    def set_mask(
        self, mask: Bool[Tensor, "batch length"] | None, *, encoder: Bool[Tensor, "batch source"] | None = None
    ) -> None:
        """Say which tokens of the next forward pass are text and which are padding.

        Args:
            mask: True for text; None means that all are, and that experts may be given a part of the tokens.
            encoder: The same of the encoder's input, for models that have one.
        """
        self._masks = {
            in_encoder: None if given is None else given.reshape(-1)
            for in_encoder, given in ((False, mask), (True, encoder))
        }

    def finish(self, stats: Stats, *, domain: str, tokens: int) -> None:
        """Add the sums since :meth:`start` to ``stats`` under ``domain``; ``tokens`` of text were run.

        A layer that the model did not call, such as the vision experts of a model that was given text alone, adds
        nothing.
        """
        assert any(self._current), "no layer was called"
        at = stats.domains.index(domain)
        for layer, accumulator in enumerate(self._current):
            if accumulator is None:
                continue
            columns = accumulator.sums.cpu().numpy()
            for column, name in enumerate(SUM_COLUMNS):
                if name in self.quantities:
                    stats.experts[name][at, layer] += columns[:, column]
            if "max_abs" in self.quantities:
                peak = stats.experts["max_abs"][at, layer]
                peak[:] = accumulator.max_abs.double().cpu().numpy().clip(min=peak)
            stats.layers["gate_entropy_sum"][at, layer] += float(accumulator.gate_entropy)
        stats.tokens[at] += tokens

    def _add(self, layer: int, seen: Seen) -> None:
        mask = self._masks.get(self._in_encoder[layer])
        if mask is not None and mask.shape[0] != seen.weights.shape[0]:
            raise UnsupportedModelError(
                f"{self._paths[layer]} was given {seen.weights.shape[0]} tokens for a batch of {mask.shape[0]}: this "
                "model does not run its experts on every token that it reads, once, so that its statistics would not "
                "be those of the text."
            )
        mask = None if mask is None or bool(mask.all()) else mask.to(seen.gates.device)
        keep = None if mask is None else mask[seen.tokens]
        # Made here, because only here it is known where the layer runs: its weights may be offloaded between calls.
        sums = self._current[layer] or LayerAccumulator(self._num_experts, seen.gates.device)
        sums.add(seen.outputs, seen.gates, seen.experts, keep, weighted=seen.weighted)
        sums.add_entropy(seen.weights, mask)
        self._current[layer] = sums
