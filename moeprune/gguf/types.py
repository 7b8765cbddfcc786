"""Sizes of the ggml tensor types, as the gguf package knows them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moeprune.errors import MissingDependencyError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A storage type: blocks of ``block`` elements that take ``num_bytes`` bytes each.

    Attributes:
        name: As llama.cpp spells it (``Q4_K``).
        number: Its number in the file.
        block: Elements a block; a row (the first dimension) is a whole number of them.
        num_bytes: Bytes a block.
    """

    name: str
    number: int
    block: int
    num_bytes: int


@functools.cache
def ggml_types() -> dict[int, GgmlType]:
    """All types by number.

    Raises:
        MissingDependencyError: If the gguf package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files need the gguf package, which is not installed. Run: pip install 'moeprune[gguf]'"
        ) from error
    return {
        int(kind): GgmlType(kind.name, int(kind), block, num_bytes)
        for kind, (block, num_bytes) in GGML_QUANT_SIZES.items()
    }
