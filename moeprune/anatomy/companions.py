"""Whether every expert has all tensors of its quantised weights, and where a tensor of all experts keeps them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from moeprune.anatomy.formats import FLOAT_DTYPES, SHARED_BY_ALL, Companion, StoredFormat
from moeprune.anatomy.quantization import WAY_OUT
from moeprune.errors import CheckpointError, UnsupportedModelError

WEIGHT = "weight"
# GPTQ and AWQ store the transposed weight, so that a router's experts are packed columns, and a shape is no list of
# experts. Their first axis may still be as long as there are experts.
NEVER_BY_EXPERT = frozenset({"qweight", "qzeros", "scales", "g_idx", "weight_g_idx", "weight_shape"})


class ExpertPart(NamedTuple):
    """One stored tensor of an expert's weight.

    Attributes:
        weight: The weight's key in the unquantised spelling, with ``*`` for the number of the expert.
        expert: The expert, or None if the tensor holds all experts of a layer.
        part: The companion's part of the weight, or ``weight`` for the weight itself.
        dtype: Its stored dtype, as safetensors names it.
    """

    weight: str
    expert: int | None
    part: str
    dtype: str


def expert_dim(key: str, *, shape: tuple[int, ...], companion: Companion, num_experts: int) -> int | None:
    """The expert axis of a companion that belongs to a tensor with all experts of a layer.

    Args:
        key: Its stored key, for errors.
        shape: Its stored shape.
        companion: What it is.
        num_experts: Experts of the layer.

    Returns:
        0, or None if it is one number that all experts share and that stays as it is.

    Raises:
        UnsupportedModelError: If it is neither, so that nothing says which of its values belong to which expert.
    """
    if companion.part in NEVER_BY_EXPERT:
        raise UnsupportedModelError(
            f"{key!r} is part of a quantised router, or of all experts quantised as one tensor, in a format that does "
            f"not keep the experts apart. {WAY_OUT}"
        )
    if shape and shape[0] == num_experts:
        return 0
    if prod(shape) == SHARED_BY_ALL and not companion.holds_weight:
        return None
    raise UnsupportedModelError(
        f"{key!r} is stored as {list(shape)}: expected {num_experts} experts on the first axis, or one number that all "
        f"experts share. {WAY_OUT}"
    )


def check_companions(parts: Iterable[ExpertPart], *, stored: StoredFormat, num_experts: int, where: str) -> None:
    """Refuse a checkpoint in which an expert lacks a tensor that the others have.

    Experts of one layer may differ in one way only: some stay unquantised, as quantisers do with experts that their
    calibration never reached.

    Args:
        parts: All stored tensors of the experts' weights.
        stored: The format.
        num_experts: Experts of a layer.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: What is missing, and of which expert.
    """
    weights: dict[str, dict[int | None, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for part in parts:
        weights[part.weight][part.expert][part.part] = part.dtype
    for weight, experts in weights.items():
        _check_numbers(weight, set(experts), num_experts, where)
        quantised = {expert: frozenset(held) for expert, held in experts.items() if not _is_unquantised(held)}
        if not quantised:
            continue
        usual = Counter(quantised.values()).most_common(1)[0][0]
        for expert, held in quantised.items():
            if held != usual:
                _refuse(weight, expert, held, usual, where)
        _check_usable(weight, usual, stored, where)


def _is_unquantised(held: dict[str, str]) -> bool:
    return held.keys() == {WEIGHT} and held[WEIGHT] in FLOAT_DTYPES


def _check_numbers(weight: str, experts: set[int | None], num_experts: int, where: str) -> None:
    if experts == {None}:
        return
    numbers = {expert for expert in experts if expert is not None}
    lacking = set(range(num_experts)) - numbers
    if lacking:
        raise CheckpointError(
            f"{where}: {len(lacking)} of {num_experts} experts are missing from {weight!r}, first expert "
            f"{min(lacking)}. Download the checkpoint again."
        )
    if max(numbers) >= num_experts:
        raise CheckpointError(
            f"{where}: {weight!r} has an expert {max(numbers)}, but the config says {num_experts} experts."
        )


def _check_usable(weight: str, held: frozenset[str], stored: StoredFormat, where: str) -> None:
    if not held & {WEIGHT, *stored.packed}:
        raise CheckpointError(
            f"{where}: {weight!r} has {', '.join(sorted(held))} but no values "
            f"({' or '.join([*stored.packed, WEIGHT])}). Download the checkpoint again."
        )
    if not held & set(stored.needs):
        raise CheckpointError(
            f"{where}: {weight!r} is quantised ({stored.name}) but has no {' or '.join(stored.needs)}, only "
            f"{', '.join(sorted(held))}. Download the checkpoint again."
        )


def _refuse(weight: str, expert: int | None, held: frozenset[str], usual: frozenset[str], where: str) -> None:
    lacks, extra = sorted(usual - held), sorted(held - usual)
    differs = [f"lacks {', '.join(lacks)}"] if lacks else []
    differs += [f"also has {', '.join(extra)}"] if extra else []
    raise CheckpointError(
        f"{where}: expert {expert} of {weight!r} {' and '.join(differs)}; the other experts of its layer have "
        f"{', '.join(sorted(usual))}. Download the checkpoint again, or quantise the model again."
    )
