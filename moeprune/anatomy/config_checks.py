"""What transformers accepts in a config.json although readers differ in what they make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeprune.anatomy.names import NUM_EXPERTS, TOP_K, ConfigField
from moeprune.errors import CheckpointError
from moeprune.facts import Routing


def check_spellings(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a config.json that gives two values for one thing.

    A count may stand under several names, of which transformers silently takes one and engines another; so may the
    base of the rotary embedding.

    Args:
        config: The text of config.json.
        file: Where it is, for the message.

    Raises:
        CheckpointError: If two names of the same number have different values.
    """
    for path, part in _objects(config, ""):
        for meaning, names in (("number of experts", NUM_EXPERTS), ("number of active experts", TOP_K)):
            _check_equal(file, path, meaning, {name: part[name] for name in names if _is_count(part.get(name))})
        parameters = part.get("rope_parameters")
        if isinstance(parameters, Mapping):
            thetas = {"rope_theta": part.get("rope_theta"), "rope_parameters.rope_theta": parameters.get("rope_theta")}
            given = {name: value for name, value in thetas.items() if value is not None}
            _check_equal(file, path, "base of the rotary embedding", given)


def check_counts(where: str, num_experts: ConfigField, top_k: ConfigField) -> None:
    """Refuse a config whose top-k is larger than its number of experts: transformers builds it and fails on first use.

    Args:
        where: The folder, or the model type of a config that is in none.
        num_experts: The number of experts.
        top_k: The number of active ones.

    Raises:
        CheckpointError: If it is.
    """
    if top_k.value > num_experts.value:
        raise CheckpointError(
            f"{where}: its config says {top_k.name} = {top_k.value} and {num_experts.name} = {num_experts.value}; "
            "a token cannot use more experts than a layer has. Correct config.json, or download it again."
        )


def check_groups(model_type: str, routing: Routing, *, num_experts: int, top_k: int) -> None:
    """Refuse expert groups that cannot be: transformers does not look, and mixes groups up on some numbers of tokens.

    Raises:
        CheckpointError: If the groups are of unequal size, or too few or too small to choose from.
    """
    n_group, topk_group = routing.n_group, routing.topk_group
    size, rest = divmod(num_experts, n_group)
    least = 2 if n_group > 1 and routing.group_score == "top2" else 1
    if rest or size < least or not 1 <= topk_group <= n_group or topk_group * size < top_k:
        raise CheckpointError(
            f"{model_type}: its config has {num_experts} experts in {n_group} groups, of which a token uses "
            f"{topk_group} for {top_k} experts. Groups must be equal, of at least {least}, and hold the experts of a "
            "token. Compare config.json with the original."
        )


def _objects(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _objects(value, f"{path}{key}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_equal(file: Path, path: str, meaning: str, values: Mapping[str, Any]) -> None:
    if any(value != next(iter(values.values())) for value in values.values()):
        given = " and ".join(f"{path}{name} = {value}" for name, value in values.items())
        raise CheckpointError(
            f"{file}: {given} contradict each other: both are the {meaning}, and readers differ in which they take. "
            "Keep the one that the weights were trained with."
        )
