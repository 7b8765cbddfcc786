"""Router rows beyond the experts: the last rows of an expert axis may stand for something that is not pruned.

A router may score a few more things than its experts, and their rows lie behind those of the experts. Shapes say how
many there are, not which: this was read in the model's code.
"""

from __future__ import annotations

from moeprune.errors import UnsupportedModelError

EXTRA_ROWS = {
    "inkling_text": "shared experts, whose weights come from the same router",
    "longcat_flash": "zero experts, which hand a token through",
    "zaya": "the choice to skip the experts",
}


def check_extra_rows(model_type: str, name: str, extra: int) -> None:
    """Refuse a model whose extra rows nobody has looked at.

    Raises:
        UnsupportedModelError: If the meaning of the rows is unknown.
    """
    if model_type not in EXTRA_ROWS:
        raise UnsupportedModelError(
            f"{model_type}: {name!r} has {extra} more entries than experts, and what they mean is unknown. Pruning it "
            "could drop something that is not an expert."
        )
