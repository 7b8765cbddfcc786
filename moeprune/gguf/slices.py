"""Which bytes of a GGUF file become which tensor of the pruned one. Arithmetic on headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moeprune.gguf.header import GgufTensor
from moeprune.gguf.model import GgufModel
from moeprune.gguf.roles import Single, Stacked


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the pruned file and where its bytes come from.

    Attributes:
        name: Its name in the pruned file.
        source: The stored tensor it is made of.
        keep: Kept expert ids if it is a slice, else None: the source's bytes as they are.
        axis: The dimension of the experts of a slice, outermost but for ones.
    """

    name: str
    source: GgufTensor
    keep: tuple[int, ...] | None = None
    axis: int = 0

    @property
    def ne(self) -> tuple[int, ...]:
        """Its dimensions in ggml's order."""
        ne = self.source.ne
        return ne if self.keep is None else (*ne[: self.axis], len(self.keep), *ne[self.axis + 1 :])

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.source.num_bytes if self.keep is None else self._stride * len(self.keep)

    @property
    def _stride(self) -> int:
        # Rows are whole blocks and the expert axis is outermost, so an expert is a whole number of bytes.
        stride, rest = divmod(self.source.num_bytes, self.source.ne[self.axis])
        assert rest == 0, f"{self.source.name}: an expert is not a whole number of bytes"
        return stride

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First byte and byte after the last of each run of the source's file, in the order of writing."""
        if self.keep is None:
            yield self.source.start, self.source.end
            return
        for first, last in _runs(self.keep):
            yield self.source.start + first * self._stride, self.source.start + (last + 1) * self._stride


def plan_outputs(model: GgufModel, keep: Mapping[int, Sequence[int]]) -> list[OutputTensor]:
    """Every tensor of the pruned file, in the order of the source.

    Args:
        model: The source.
        keep: Kept expert ids by block, ascending.
    """
    outputs = []
    for name, tensor in model.file.tensors.items():
        role = model.roles.get(name)
        if isinstance(role, Single):
            if role.expert in keep[role.block]:
                new = keep[role.block].index(role.expert)
                outputs.append(OutputTensor(role.renamed(new), tensor))
        elif isinstance(role, Stacked) and len(keep[role.block]) < model.num_experts:
            outputs.append(OutputTensor(name, tensor, tuple(keep[role.block]), role.axis))
        else:
            outputs.append(OutputTensor(name, tensor))
    return outputs


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last id of each run of consecutive ids: (0, 1, 2, 5) -> (0, 2), (5, 5)."""
    first = last = ids[0]
    for expert in ids[1:]:
        if expert != last + 1:
            yield first, last
            first = expert
        last = expert
    yield first, last
