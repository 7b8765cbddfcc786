"""How ``quantization_config`` says that the experts are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantisation:
    """A storage format, as far as kernels care.

    Attributes:
        method: ``quant_method``; ``"none"`` for an unquantised model.
        kind: ``"none"``, ``"fp8"``, ``"int8"``, ``"int4"``, or ``"other"``.
        block: Rows and columns that share one scale, for block formats.
        group: Columns that share one scale, for group formats.
    """

    method: str
    kind: str
    block: tuple[int, int] | None = None
    group: int | None = None


def read_quantisation(config: Any) -> Quantisation:
    """Read a ``quantization_config``, None or empty for an unquantised model."""
    if not isinstance(config, dict) or not config:
        return Quantisation("none", "none")
    method = str(config.get("quant_method", "unknown"))
    groups = config.get("config_groups")
    weights = next(iter(groups.values()), {}).get("weights") or {} if isinstance(groups, dict) else {}
    block = config.get("weight_block_size") or weights.get("block_structure")
    bits = config.get("bits") or weights.get("num_bits")
    if method == "fp8" or (weights.get("type") == "float" and bits == 8):
        kind = "fp8"
    elif weights.get("type", "int") == "int" and bits in (4, 8):
        kind = f"int{bits}"
    else:
        kind = "other"
    group = config.get("group_size") or weights.get("group_size")
    return Quantisation(
        method,
        kind,
        block=(int(block[0]), int(block[1])) if isinstance(block, list | tuple) and len(block) == 2 else None,
        group=group if isinstance(group, int) and group > 0 else None,
    )
