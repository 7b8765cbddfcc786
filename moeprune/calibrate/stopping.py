"""End a forward pass where nothing is left to be seen: after the last layer with experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel


class _Done(BaseException):
    """Raised through the model's own code; not an :class:`Exception`, so that none of it is caught on the way."""


class EarlyStop:
    """Runs the forward passes of a model up to the layer with experts that it calls last.

    The first pass runs in full and shows which layers are called in which order, whatever the architecture; a pass
    that then takes another way is run in full, too.

    Args:
        model: The model.
        layers: Paths of the modules that hold a set of experts each, in any order.
    """

    def __init__(self, model: PreTrainedModel, *, layers: Sequence[str]):
        self._layers = [model.get_submodule(path) for path in layers]
        self._order: list[int] | None = None
        self._called: list[int] = []
        self._running = False

    @contextmanager
    def watching(self) -> Iterator[EarlyStop]:
        """Watch the layers inside the block. Enter it after whatever else hooks into them, which then is run first."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                handle = layer.register_forward_hook(partial(self._after, number))
                stack.callback(handle.remove)
            yield self

    def run(self, forward: Callable[[], object]) -> None:
        """Call ``forward``, up to the end of the last layer with experts."""
        self._called, self._running = [], True
        try:
            forward()
        except _Done:
            return
        finally:
            self._running = False
        self._order = self._called

    def _after(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        self._called.append(number)
        if self._running and self._called == self._order:
            raise _Done
