"""What is seen beside the experts: the router's logits, and the residual stream that the experts' output joins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Logits:
    """The logits of one router, taken from what it returns.

    Routers return them alone, or among scores, weights and ids in any order. Of the outputs with one column for each
    expert, the logits are those that are not scores, that is, not all 0 or more; the first call decides. A router that
    returns none has none: they are not computed a second time.
    """

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._place: int | None = None
        self._tried = False
        self._latest: Tensor | None = None

    @contextmanager
    def watching(self, router: nn.Module) -> Iterator[None]:
        """Keep the latest logits inside the block."""
        hook = router.register_forward_hook(self._keep)
        try:
            yield
        finally:
            hook.remove()
            self._latest = None

    def take(self, tokens: int) -> Float[Tensor, "tokens experts"] | None:
        """The logits since the last call in float32, if there are any for so many tokens."""
        latest, self._latest = self._latest, None
        if latest is None or latest.shape[0] != tokens:
            return None
        return latest.float()

    def _keep(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not self._tried:  # once, because a GPU is waited for when its values are looked at
            self._tried = True
            fitting = [place for place, output in enumerate(outputs) if self._fits(output)]
            self._place = next((place for place in fitting if bool((outputs[place] < 0).any())), None)
        if self._place is not None and self._fits(outputs[self._place]):
            self._latest = outputs[self._place].detach().reshape(-1, self._num_experts)

    def _fits(self, output: Any) -> bool:
        floats = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1
        return floats and output.shape[-1] == self._num_experts


class Residual:
    """The residual stream x that one layer's experts add to.

    It is the input of the norm whose output is the input of the module that holds router and experts. That the module's
    output is added to it, and nothing else, is checked in the first call, to the last bit: in a layer that does
    anything else (a norm or a factor after the experts, parallel branches, several streams) x is not known.
    """

    def __init__(self, model: nn.Module, experts: str):
        parts = experts.split(".")
        self.known = False
        for depth in range(len(parts) - 1, 0, -1):
            self._owner = model.get_submodule(".".join(parts[:depth]))
            self._norms = [child for child in self._owner.children() if _is_norm(child)]
            if self._norms:
                self._block = self._owner.get_submodule(parts[depth])
                self.known = True
                break
        self._checked = False
        self._normed: list[tuple[Tensor, Tensor]] = []
        self._stream: Tensor | None = None
        self._added: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the latest residual stream inside the block."""
        if not self.known:
            yield
            return
        with ExitStack() as stack:
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(self._norm).remove)
            before = self._block.register_forward_pre_hook(self._enter, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(self._block.register_forward_hook(self._leave).remove)
            stack.callback(self._owner.register_forward_hook(self._end).remove)
            yield
        self._normed, self._stream, self._added = [], None, None

    def take(self, tokens: int) -> Float[Tensor, "tokens hidden"] | None:
        """The stream of the running call, if it is known."""
        if not self.known or self._stream is None:
            return None
        flat = self._stream.reshape(-1, self._stream.shape[-1])
        return flat if flat.shape[0] == tokens else None

    def _norm(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self._normed.append((inputs[0], output))

    def _enter(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        same = [x for x, y in self._normed if given is not None and _is_same(y, given)]
        self._stream = same[-1] if same else None
        self._normed.clear()

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._added = None if self._checked else _first(output)

    def _end(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._checked:
            self._checked = True
            result = _first(output)
            known = self._stream is not None and self._added is not None and result is not None
            self.known = known and _adds_up(self._stream, self._added, result)
        self._normed, self._stream, self._added = [], None, None


def _adds_up(stream: Any, added: Any, result: Any) -> bool:
    if added.numel() != stream.numel() or result.shape != stream.shape:
        return False
    total = stream + added.view_as(stream)
    # Where the model overflows there is nothing to compare; the statistics are refused for it.
    return bool(((total == result) | ~torch.isfinite(result)).all())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _first(output: Any) -> Tensor | None:
    output = output[0] if isinstance(output, tuple) and output else output
    return output if isinstance(output, Tensor) else None
