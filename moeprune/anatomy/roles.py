"""What a stored tensor is to the experts of its layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OneExpert:
    """A tensor of one expert. ``key[start:stop]`` is its number.

    Attributes:
        layer: The expert layer.
        expert: Its id in that layer. An id beyond the last expert is a row that is no expert and stays (zero experts).
        start: Where the number begins in the key.
        stop: Where it ends.
        tower: How many sets of experts precede this one in the stored numbering (ERNIE-VL's vision experts: 1).
    """

    layer: str
    expert: int
    start: int
    stop: int
    tower: int = 0

    def renumbered(self, key: str, number: int) -> str:
        """``key`` with another number."""
        return f"{key[: self.start]}{number}{key[self.stop :]}"


@dataclass(frozen=True, slots=True)
class AllExperts:
    """A tensor with all experts of a layer along ``dim``.

    Attributes:
        layer: The expert layer.
        dim: The axis that counts experts.
        rows: Entries along it for each expert.
        extra: Entries after those of the experts, which stay.
    """

    layer: str
    dim: int
    rows: int = 1
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Towers:
    """A tensor whose first axis counts sets of experts and whose axis ``dim`` counts the experts of each."""

    layers: tuple[str, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class ExpertIds:
    """A table of expert ids, one row a token id."""

    layer: str


Role = OneExpert | AllExperts | Towers | ExpertIds
