"""One decoder layer in the model's own forward pass.

The forward pass of a batch is begun anew for every layer. Layers before the one that is wanted return what they
returned before instead of computing it, and the pass is left as soon as the wanted layer has run. So masks, positions,
streams of residuals and whatever else a model does outside of its layers are its own business, and are in memory for
one batch at a time; beside the weights of one layer there are only the outputs of layers that are still to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moeprune.calibrate.streaming.tree import is_poisoned, leaves


@dataclass
class Result:
    """What a layer did.

    Attributes:
        output: What it returned.
        shared: What it put into dictionaries that it was given, by name of the argument.
    """

    output: Any
    shared: dict[str, dict[Any, Any]] = field(default_factory=dict)


class Reached(BaseException):
    """Leaves a forward pass after the wanted layer. No error: nothing between here and there should handle it."""

    def __init__(self, result: Result):
        super().__init__()
        self.result = result


Instead = Callable[[int, tuple[Any, ...], dict[str, Any]], Result]
"""What a layer did, by its position in the pass and the arguments it is called with now."""


Inspect = Callable[[Any], None]


class Replay:
    """Wraps the layers of a model so that a forward pass can be run up to one of them.

    Args:
        model: The model.
        layers: Paths of its layers.
    """

    def __init__(self, model: nn.Module, layers: list[str]):
        self._modules = {path: model.get_submodule(path) for path in layers}
        self._position = 0
        self._wanted: int | None = None
        self._instead: Instead = _unexpected
        self._inspect: Inspect = _accept
        self._ran: dict[str, dict[Any, Any]] | None = None
        self.called: list[str] = []

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """The layers are wrapped inside the block."""
        try:
            for path, module in self._modules.items():
                module.forward = self._wrapper(path, module.forward)
            yield
        finally:
            for module in self._modules.values():
                module.__dict__.pop("forward", None)

    def run(
        self, forward: Callable[[], Any], *, wanted: int | None, instead: Instead, inspect: Inspect | None = None
    ) -> Result | None:
        """Run a forward pass up to a layer.

        Args:
            forward: Runs the model.
            wanted: Position, in the order of calls, of the layer that is to compute; None to run none and go on to
                the end.
            instead: Gives what the others did.
            inspect: Sees the arguments of the wanted layer before it runs.

        Returns:
            What the wanted layer did; None if none was wanted. :attr:`called` then holds the paths of the layers that
            were called, in order.
        """
        self._position, self._wanted, self._instead, self._inspect = 0, wanted, instead, inspect or _accept
        self.called, self._ran = [], None
        # Made anew for every pass, to be after the hooks of whoever else watches the layer.
        hooks = [module.register_forward_hook(self._leave) for module in self._modules.values()]
        try:
            forward()
        except Reached as reached:
            return reached.result
        finally:
            for hook in hooks:
                hook.remove()
        assert wanted is None, f"the model called {self._position} layers, position {wanted} was wanted"
        return None

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._ran is not None:
            raise Reached(Result(output, self._ran))

    def _wrapper(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            position, self._position = self._position, self._position + 1
            self.called.append(path)
            if position != self._wanted:
                done = self._instead(position, args, kwargs)
                _share(done.shared, args, kwargs)
                return done.output
            self._inspect((args, kwargs))
            before = {name: dict(given) for name, given in _dictionaries(args, kwargs)}
            output = original(*args, **kwargs)
            self._ran = {
                name: changed
                for name, given in _dictionaries(args, kwargs)
                if (changed := {k: v for k, v in given.items() if k not in before[name] or v is not before[name][k]})
            }
            return output

        return forward


def _dictionaries(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    """The arguments through which layers could tell each other something."""
    for name, value in (*((str(i), arg) for i, arg in enumerate(args)), *kwargs.items()):
        if isinstance(value, MutableMapping):
            yield name, value


def _share(shared: Mapping[str, Mapping[Any, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for name, given in _dictionaries(args, kwargs):
        given.update(shared.get(name, {}))


def _unexpected(position: int, args: Any, kwargs: Any) -> Result:
    raise AssertionError("a layer was called outside of a pass")


def _accept(arguments: Any) -> None:
    pass


def reads_placeholder(args: Any) -> bool:
    """Whether an argument of a layer was computed from a placeholder."""
    return any(is_poisoned(tensor) for tensor in leaves(args))
