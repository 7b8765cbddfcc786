"""Running a model a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.anatomy.axes import decoder_layer_of
from moeprune.anatomy.source import Source
from moeprune.calibrate.streaming.lookahead import Schedule, look_ahead
from moeprune.calibrate.streaming.planned import PlannedWeights
from moeprune.calibrate.streaming.replay import Replay, Result, reads_placeholder
from moeprune.calibrate.streaming.shelf import Shelf, decode, encode
from moeprune.calibrate.streaming.skeleton import build_skeleton
from moeprune.calibrate.streaming.tree import is_poisoned, leaves, mapped, poisoned
from moeprune.calibrate.streaming.weights import Weights, own_names
from moeprune.errors import UnsupportedModelError
from moeprune.plan.plan import Plan

Forward = Callable[[], Any]


class LayerStream:
    """A model of which one layer is in memory, and the next being read.

    Args:
        source: The checkpoint.
        dtype: As :func:`moeprune.calibrate.streaming.skeleton.build_skeleton` takes it.
        device: Where it runs.
        plan: Applied to the model, which then is the pruned one; without it the model is as stored.
    """

    def __init__(self, source: Source, *, dtype: str, device: torch.device, plan: Plan | None = None):
        skeleton = build_skeleton(source, dtype=dtype, device=device)
        tensors = source.checkpoint.tensors
        if plan is None:
            self.weights = Weights(skeleton, tensors, device=device)
        else:
            self.weights = PlannedWeights(skeleton, tensors, device=device, plan=plan, anatomy=source.anatomy)
        self.source = source
        self.model = self.weights.model
        self.device = device
        self.dtype = skeleton.dtype
        self.holders = {decoder_layer_of(self.model, layer.experts) for layer in source.anatomy.layers}
        self.paths = streamed_layers(self.model, self.holders)
        self.replay = Replay(self.model, self.paths)
        self.shelf = Shelf()
        self.schedule: Schedule | None = None
        self._placeholders: list[list[Any]] = []
        self._shared: dict[str, set[tuple[str, Any]]] = {}
        self._overflowed = False
        self._reading: dict[str, Future[dict[str, Tensor]]] = {}
        self._resident: str | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside the block the model's layers are loaded as they are called, everything else when it is first used."""
        with ExitStack() as stack:
            self._pool = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="moeprune-read"))
            stack.enter_context(self.replay.wrapped())
            self._move_inputs(stack)
            for path, names in own_names(self.model).items():
                if not any(path == layer or path.startswith(f"{layer}.") for layer in self.paths):
                    self._load_when_called(self.model.get_submodule(path), names, stack)
            yield

    def _move_inputs(self, stack: ExitStack) -> None:
        """Let whatever contains layers take its inputs to the device: a caller cannot see where the model runs."""

        def move(_: nn.Module, args: Any, kwargs: Any) -> Any:
            brought = [v.to(self.device) if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())]
            return tuple(brought[: len(args)]), dict(zip(kwargs, brought[len(args) :], strict=True))

        above = {".".join(path.split(".")[:depth]) for path in self.paths for depth in range(1, path.count("."))}
        for path in above if self.device.type != "cpu" else ():
            stack.callback(self.model.get_submodule(path).register_forward_pre_hook(move, with_kwargs=True).remove)

    def _load_when_called(self, module: nn.Module, names: list[str], stack: ExitStack) -> None:
        def load(*_: Any) -> None:
            hook.remove()
            if any(self.weights.is_empty(name) for name in names):
                self.weights.install(self.weights.read(names))

        hook = module.register_forward_pre_hook(load, prepend=True)
        stack.callback(hook.remove)

    def plan(self, forward: Forward) -> Result:
        """Find the schedule.

        Args:
            forward: Runs the model on a few tokens.

        Returns:
            What the first layer did with them, from which the size of hidden states can be told.
        """
        first = self._first_called(forward)
        self._load(first)
        result = self.replay.run(forward, wanted=0, instead=_nothing)
        assert result is not None
        self.schedule = look_ahead(self.replay, forward, template=result.output)
        return result

    def _first_called(self, forward: Forward) -> str:
        class Called(BaseException):
            pass

        def leave(*_: Any) -> Result:
            raise Called

        try:
            self.replay.run(forward, wanted=None, instead=leave)
        except Called:
            return self.replay.called[0]
        raise UnsupportedModelError(f"{type(self.model).__name__} calls none of its layers; it cannot be streamed.")

    def advance(self, position: int, forwards: Sequence[Forward], *, keep: bool = True) -> Iterator[int]:
        """Run one layer on all batches.

        Args:
            position: Of the layer, one more than that of the call before.
            forwards: One for each batch; runs the model on it.
            keep: Whether later layers will run, too, so that outputs must be kept.

        Yields:
            The batch that is about to run.

        Raises:
            UnsupportedModelError: If the layer reads something that was not found to be read and is not kept any more.
        """
        assert self.schedule is not None
        self._load(self.schedule.order[position])
        if keep and position + 1 < len(self.schedule.order):
            self._begin_reading(self.schedule.order[position + 1])
        placeholders: list[Any] = []
        shared: set[tuple[str, Any]] = set()
        for batch, forward in enumerate(forwards):
            yield batch
            inspect = partial(self._check_arguments, position) if batch == 0 else None
            instead = partial(self._instead, position, batch)
            result = self.replay.run(forward, wanted=position, instead=instead, inspect=inspect)
            assert result is not None
            if keep:
                placeholders.append(mapped(result.output, poisoned))
                shared |= self._keep(position, batch, result)
            # An overflow of the model looks like a placeholder from here on; it is refused with the statistics.
            self._overflowed = self._overflowed or (batch == 0 and any(map(is_poisoned, leaves(result.output))))
        self._placeholders.append(placeholders)
        if shared:
            self._shared[f"shared-{position}"] = shared
        for name in (f"output-{position}", *self._shared):
            self.shelf.complete(name)

    def _keep(self, position: int, batch: int, result: Result) -> set[tuple[str, Any]]:
        self.shelf.put(f"output-{position}", batch, result.output)
        if result.shared:
            self.shelf.put(f"shared-{position}", batch, result.shared)
        return {(name, key) for name, put in result.shared.items() for key in put}

    def tidy(self, position: int) -> None:
        """Forget what no layer after ``position`` reads."""
        for name in self._obsolete(position):
            self._shared.pop(name, None)
            self.shelf.drop(name)

    def _obsolete(self, position: int) -> list[str]:
        assert self.schedule is not None
        readers = self.schedule.last_reader[: position + 1]
        outputs = [f"output-{before}" for before, reader in enumerate(readers) if reader == position]
        latest = self._shared.get(f"shared-{position}", set())
        return outputs + [
            name for name, keys in self._shared.items() if keys <= latest and name != f"shared-{position}"
        ]

    def end(self, batch: int, forward: Forward) -> Any:
        """Run what follows the layers, all of which have been run and kept.

        Args:
            batch: Number of the batch.
            forward: Runs the model on it.

        Returns:
            What ``forward`` returns.

        Raises:
            UnsupportedModelError: If it was computed from something that is not kept any more.
        """
        assert self.schedule is not None
        returned: list[Any] = []
        instead = partial(self._instead, len(self.schedule.order), batch)
        self.replay.run(lambda: returned.append(forward()), wanted=None, instead=instead)
        if not self._overflowed and reads_placeholder(returned):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads what an early layer returned after its last layer. It cannot be "
                "streamed; load it as a whole."
            )
        return returned[0]

    def state(self, position: int) -> dict[str, Any]:
        """What :meth:`restore` needs to go on after ``position``, beside the files of a :class:`DiskShelf`, as JSON."""
        assert self.schedule is not None
        obsolete = self._obsolete(position)
        return {
            "order": list(self.schedule.order),
            "last_reader": list(self.schedule.last_reader),
            "table": {name: codes for name, codes in self.shelf.table.items() if name not in obsolete},
            "shared": [[name, [*map(list, keys)]] for name, keys in self._shared.items() if name not in obsolete],
            "placeholders": [[encode(nest, None) for nest in nests] for nests in self._placeholders],
            "overflowed": self._overflowed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.schedule = Schedule(tuple(state["order"]), tuple(state["last_reader"]))
        self._shared = {name: {(argument, key) for argument, key in keys} for name, keys in state["shared"]}
        self._placeholders = [
            [mapped(decode(code, None, self.device), partial(poisoned, device=self.device)) for code in codes]
            for codes in state["placeholders"]
        ]
        self._overflowed = state["overflowed"]

    def _instead(self, wanted: int, batch: int, position: int, args: Any, kwargs: Any) -> Result:
        """What the layer at ``position`` did with the batch, for the layer at ``wanted`` to go on from."""
        assert self.schedule is not None
        shared: dict[str, dict[Any, Any]] = {}
        for name in self._shared if position == 0 else ():
            for argument, values in self.shelf.get(name, batch, device=self.device, last=False).items():
                shared.setdefault(argument, {}).update(values)
        last_reader = self.schedule.last_reader[position]
        if last_reader < wanted:
            return Result(self._placeholders[position][batch], shared)
        last = last_reader == wanted
        return Result(self.shelf.get(f"output-{position}", batch, device=self.device, last=last), shared)

    def _check_arguments(self, position: int, arguments: Any) -> None:
        """Refuse a layer whose input was computed from a placeholder."""
        assert self.schedule is not None
        if not self._overflowed and reads_placeholder(arguments):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {self.schedule.order[position]} reads what an earlier layer returned, "
                "which was not seen when the model was tried on a few tokens. It cannot be streamed; load it as a "
                "whole with --no-stream."
            )

    def _load(self, path: str) -> None:
        if path == self._resident:
            return
        if self._resident is not None:
            self._release()
        self._begin_reading(path)
        self.weights.install(self._reading.pop(path).result())
        self._resident = path

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the memory is given to the next layer by another thread
        assert self._resident is not None
        self.weights.free(self._resident)
        self._resident = None

    def _begin_reading(self, path: str) -> None:
        if path not in self._reading and path != self._resident:
            self._reading[path] = self._pool.submit(self.weights.read, self.weights.names_in(path))


def streamed_layers(model: nn.Module, holders: set[str]) -> list[str]:
    """Paths of all layers of the stacks that hold experts, with experts or without."""
    stacks = sorted({path.rpartition(".")[0] for path in holders})
    return [f"{stack}.{name}" for stack in stacks for name, _ in model.get_submodule(stack).named_children()]


def _nothing(position: int, args: Any, kwargs: Any) -> Result:
    raise AssertionError("the first layer is the first to be called")
