"""Stored keys to names in the model, by transformers' own key mapping."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moeprune.anatomy.anatomy import Anatomy


@dataclass(frozen=True, slots=True)
class Renamed:
    """What the loader makes of a stored key.

    Attributes:
        name: The tensor of the model that the stored tensor becomes, or becomes a part of.
        one_of_many: Whether the stored tensors of all experts are stacked to that tensor.
        swapped: Two axes that the loader exchanges.
        others: Further tensors of the model that it also becomes a part of (projections stored as one).
    """

    name: str
    one_of_many: bool = False
    swapped: tuple[int, int] | None = None
    others: tuple[str, ...] = ()


class Renamer:
    """Renames stored keys as ``from_pretrained`` would.

    Args:
        anatomy: The model.
    """

    def __init__(self, anatomy: Anatomy):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        model = anatomy.skeleton
        transforms = get_model_conversion_mapping(model)
        self.known = model.state_dict()
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix

    @property
    def stacks_experts(self) -> bool:
        """Whether the loader stacks tensors of single experts."""
        return any("experts" in pattern and "*" in pattern for c in self._converters for pattern in c.source_patterns)

    def __call__(self, key: str) -> Renamed:
        """What the loader makes of ``key``."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.known)
        if name not in self.known and key in self.known:
            return Renamed(key)  # the loader, too, leaves a key alone that already is a name of the model
        if pattern is None:
            return Renamed(name)
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        return Renamed(name, "*" in pattern, _swapped(converter), tuple(self._others(name, converter)))

    def _others(self, name: str, converter: Any) -> Iterator[str]:
        first, *rest = converter.target_patterns
        for target in rest:
            other = name.replace(first.lstrip("^").rstrip("$"), target.lstrip("^").rstrip("$"))
            if other != name and other in self.known:
                yield other


def _swapped(converter: Any) -> tuple[int, int] | None:
    from transformers.core_model_loading import Transpose

    for operation in converter.operations:
        # With check_dims it swaps only what does not fit otherwise, which is never the axis of the experts.
        if isinstance(operation, Transpose) and not getattr(operation, "check_dims", False):
            return operation.dim0, operation.dim1
    return None


def in_loading_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order in which the loader renames them: some of its rules apply only after others have."""
    return sorted(keys, key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)])
