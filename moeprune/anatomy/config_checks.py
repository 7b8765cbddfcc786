"""What transformers accepts in a config.json although readers differ in what they make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeprune.anatomy.names import NUM_EXPERTS, TOP_K
from moeprune.errors import CheckpointError

# Checkpoints whose model_type transformers does not know, or takes for another model, while `architectures` names a
# class that it has, with the same tensors and the same fields in its config. Kimi-K2's deployment guide says to change
# the one word where a runtime does not know it; Hunyuan-A13B and MiniMax-M2 changed theirs on the Hub after release.
SAME_ARCHITECTURE: dict[tuple[str, str], str] = {
    ("kimi_k2", "DeepseekV3ForCausalLM"): "deepseek_v3",
    ("hunyuan", "HunYuanMoEV1ForCausalLM"): "hunyuan_v1_moe",
    ("minimax", "MiniMaxM2ForCausalLM"): "minimax_m2",
}


def known_as(config: Mapping[str, Any]) -> str | None:
    """The model type under which transformers knows the model of a config.json, if that is another than it says."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return SAME_ARCHITECTURE.get((str(config.get("model_type")), str(first)))


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
