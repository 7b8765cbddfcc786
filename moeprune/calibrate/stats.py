"""Statistics of routers and experts: sums, so that two files add up. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as encode

from moeprune.errors import StatsError, did_you_mean
from moeprune.facts import ModelFacts
from moeprune.files import parse_json, replacing

FORMAT = 1

EXPERT_SUMS = {
    "count": "tokens routed to the expert",
    "gate_sum": "sum of g over them",
    "norm_sum": "sum of |f|",
    "norm_sq_sum": "sum of |f|^2",
    "gated_norm_sum": "sum of |g f|",
    "max_abs": "largest |element| of any f (a maximum, not a sum)",
}
"""What is kept for each layer, expert and domain; g is the weight the model combines with, f the unweighted output.

A token counts where g is not 0. Where a model multiplies the input of its experts by g, the contribution f(g x) takes
the place of g f, and what would need f(x) is absent: it is neither zero nor made up.
"""

LAYER_SUMS = {"gate_entropy_sum": "sum over tokens of the entropy in nats of the normalised top-k weights"}
"""What is kept for each layer and domain."""


@dataclass
class Stats:
    """Router statistics of one or more calibration runs of one model.

    Attributes:
        model: The model they belong to.
        domains: Names of the text domains, in order.
        tokens: Tokens seen by domain, padding excluded.
        experts: For each name of :data:`EXPERT_SUMS` that the model gives an array over (domains, layers, experts);
            ``count`` always is among them.
        layers: For each name of :data:`LAYER_SUMS` an array over (domains, layers).
        runs: How each part was made (data, seed, versions), for the record.
    """

    model: ModelFacts
    domains: tuple[str, ...]
    tokens: Float64[ndarray, " domains"]
    experts: dict[str, Float64[ndarray, "domains layers experts"]]
    layers: dict[str, Float64[ndarray, "domains layers"]]
    runs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def zeros(cls, model: ModelFacts, *, domains: Sequence[str], sums: Sequence[str] = tuple(EXPERT_SUMS)) -> Stats:
        """Statistics of no text; ``sums`` are the names of :data:`EXPERT_SUMS` that the model gives."""
        shape = (len(domains), len(model.layers), model.num_experts)
        return cls(
            model=model,
            domains=tuple(domains),
            tokens=np.zeros(shape[0]),
            experts={name: np.zeros(shape) for name in sums},
            layers={name: np.zeros(shape[:2]) for name in LAYER_SUMS},
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file in one step: arrays as named, the rest as JSON in its metadata."""
        header = {
            "format": FORMAT,
            "model": self.model.model_dump(mode="json"),
            "domains": list(self.domains),
            "runs": self.runs,
        }
        arrays = {"tokens": self.tokens} | {f"experts.{k}": v for k, v in self.experts.items()}
        arrays |= {f"layers.{k}": v for k, v in self.layers.items()}
        with replacing(path) as temporary:
            # Not save_file: it makes files that only their owner can read, and statistics are there to be shared.
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            temporary.write_bytes(encode(contiguous, {"moeprune": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read a file that :meth:`save` wrote.

        Raises:
            StatsError: If it is missing, truncated, not a statistics file, or from a later version of moeprune.
        """
        if not path.is_file():
            raise StatsError(
                f"{path}: no such statistics file. `moeprune calibrate MODEL --data ... --out {path}` makes it."
            )
        try:
            with safe_open(path, framework="numpy") as file:
                header = _header(path, file.metadata() or {})
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StatsError(f"{path}: not a complete statistics file ({error}). Calibrate again.") from error
        if missing := {"tokens", "experts.count", *(f"layers.{name}" for name in LAYER_SUMS)} - arrays.keys():
            raise StatsError(f"{path}: statistics without {min(missing)!r}. Calibrate again.")
        try:
            stats = cls(
                model=ModelFacts.model_validate(header["model"]),
                domains=tuple(header["domains"]),
                tokens=arrays["tokens"],
                experts={name: arrays[f"experts.{name}"] for name in EXPERT_SUMS if f"experts.{name}" in arrays},
                layers={name: arrays[f"layers.{name}"] for name in LAYER_SUMS},
                runs=header["runs"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StatsError(f"{path}: statistics with a damaged header ({error}). Calibrate again.") from error
        stats.check(path)
        return stats

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of :data:`EXPERT_SUMS` that this model does not give."""
        return tuple(name for name in EXPERT_SUMS if name not in self.experts)

    def check(self, origin: Path | str) -> None:
        """Raise :class:`StatsError` if an array has another shape or a value is not finite, naming layer and expert."""
        shape = (len(self.domains), len(self.model.layers), self.model.num_experts)
        for name, array in {"tokens": self.tokens, **self.layers, **self.experts}.items():
            expected = shape[:1] if name == "tokens" else shape[:2] if name in self.layers else shape
            if array.shape != expected:
                raise StatsError(f"{origin}: {name} has shape {list(array.shape)}, expected {list(expected)}.")
        for name, array in {**self.experts, **self.layers}.items():
            if not np.isfinite(array).all():
                domain, layer, *expert = (int(i) for i in np.argwhere(~np.isfinite(array))[0])
                where = " ".join([self.model.layers[layer], *(f"expert {i}" for i in expert)])
                raise StatsError(
                    f"{origin}: {name} of {where} in domain {self.domains[domain]!r} is "
                    f"{array[domain, layer, *expert]}. The model overflows on this text; calibrate in another dtype."
                )

    def mixed(self, weights: Mapping[str, float] | None = None) -> dict[str, Float64[ndarray, "layers experts"]]:
        """The expert sums over all domains.

        Args:
            weights: Share of each domain in the mix, any positive scale. Each domain's sums are first divided by its
                tokens, so a share says how often its tokens occur, however much of it was calibrated on. Without
                weights the sums are added as they are.

        Returns:
            For each name in ``experts`` an array over (layers, experts); ``max_abs`` is the maximum over the domains
            that take part.

        Raises:
            StatsError: If a domain is unknown, a weight is negative, or no token was seen.
        """
        share = self._shares(weights)
        mixed = {name: np.tensordot(share, array, axes=1) for name, array in self.experts.items() if name != "max_abs"}
        if "max_abs" in self.experts:
            mixed["max_abs"] = self.experts["max_abs"][share > 0].max(axis=0)
        return mixed

    def _shares(self, weights: Mapping[str, float] | None) -> Float64[ndarray, " domains"]:
        if not self.tokens.sum() > 0:
            raise StatsError("these statistics saw no token. Calibrate on some text.")
        if weights is None:
            return (self.tokens > 0).astype(float)
        for name, weight in weights.items():
            if name not in self.domains:
                raise StatsError(f"unknown domain {name!r}. {did_you_mean(name, self.domains)}")
            if not 0 <= weight < np.inf:
                raise StatsError(f"domain {name!r}: expected a weight of 0 or more, got {weight}.")
        share = np.array([weights.get(name, 0.0) for name in self.domains])
        empty = [name for name, w, tokens in zip(self.domains, share, self.tokens, strict=True) if w > 0 and not tokens]
        if empty or not share.sum() > 0:
            raise StatsError(f"no token was seen of domain {empty[0]!r}." if empty else "all domain weights are 0.")
        return share / share.sum() * self.tokens.sum() / np.maximum(self.tokens, 1)


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "moeprune" not in metadata:
        raise StatsError(f"{path}: a safetensors file, but not statistics of moeprune.")
    try:
        header = parse_json(metadata["moeprune"].encode())
        version = int(header["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise StatsError(f"{path}: statistics with a damaged header ({error}). Calibrate again.") from error
    if version > FORMAT:
        raise StatsError(
            f"{path}: statistics format {version}; this version of moeprune reads {FORMAT}. Update moeprune."
        )
    return header


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """The statistics of one run over all texts of ``parts``. Domains of the same name are added together.

    A sum that one part lacks is unknown for the whole and is left out.

    Args:
        parts: At least one; all of the same model.

    Raises:
        StatsError: If they belong to different models.
    """
    assert parts, "merge_stats needs at least one part"
    first = parts[0].model
    for part in parts[1:]:
        if part.model.fingerprint != first.fingerprint or part.model.layers != first.layers:
            raise StatsError(
                f"statistics of different models cannot be merged: {first.name} ({first.fingerprint[:12]}) and "
                f"{part.model.name} ({part.model.fingerprint[:12]})."
            )
    merged = Stats.zeros(
        first,
        domains=list(dict.fromkeys(name for part in parts for name in part.domains)),
        sums=[name for name in EXPERT_SUMS if all(name in part.experts for part in parts)],
    )
    for part in parts:
        at = [merged.domains.index(name) for name in part.domains]
        merged.tokens[at] += part.tokens
        for name in merged.experts:
            array = part.experts[name]
            merged.experts[name][at] = (
                np.maximum(merged.experts[name][at], array) if name == "max_abs" else merged.experts[name][at] + array
            )
        for name, array in part.layers.items():
            merged.layers[name][at] += array
        merged.runs.extend(part.runs)
    return merged
