"""Two sets of experts in one decoder layer that a checkpoint keeps in one list (ERNIE-4.5-VL).

Experts 0 to E-1 of the list are the text tower's, E to 2E-1 the vision tower's, and both correction biases are rows of
one tensor. A pruned list must stay gapless: kept vision expert i is number ``kept + i``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeprune.anatomy.anatomy import Anatomy

FIRST, SECOND = ".text_moe.", ".vision_moe."


def other_tower(name: str, anatomy: Anatomy) -> str | None:
    """The vision tower's counterpart of a tensor of the text tower, if there is one."""
    twin = name.replace(FIRST, SECOND)
    return twin if twin != name and twin in anatomy.axes else None
