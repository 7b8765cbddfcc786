"""Statistics of routers and experts: sums, so that two files add up. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from moeprune.calibrate import stats_file
from moeprune.calibrate.quantities import PER_EXPERT, PER_LAYER, QUANTITIES, at_level, lowest
from moeprune.errors import StatsError, did_you_mean
from moeprune.facts import ModelFacts

EXPERT_SUMS = {name: q.meaning for name, q in QUANTITIES.items() if q.axes == PER_EXPERT and q.level == "standard"}
"""What every level keeps for each layer, expert and domain."""

LAYER_SUMS = {name: q.meaning for name, q in QUANTITIES.items() if q.axes == PER_LAYER and q.level == "standard"}
"""What every level keeps for each layer and domain."""


@dataclass
class Stats:
    """Router statistics of one or more calibration runs of one model.

    Arrays are float64; what each is over, and whether it is a sum or a maximum, is in
    :data:`moeprune.calibrate.quantities.QUANTITIES`. A quantity that the model does not give is not there.

    Attributes:
        model: The model they belong to.
        domains: Names of the text domains, in order.
        tokens: Tokens seen by domain, padding excluded.
        experts: The quantities of :data:`EXPERT_SUMS`, (domains, layers, experts); ``count`` always is among them.
        layers: The quantities of :data:`LAYER_SUMS`, (domains, layers).
        runs: How each part was made (data, seed, versions), for the record.
        more: All other quantities.
        halves: Each of ``experts``, and ``tokens``, for the even and the odd rows of the text apart: one more axis in
            front, of 2. They add up to the whole exactly. Empty where the rows were not told apart.
        statistics: The level that was asked for (:data:`moeprune.calibrate.quantities.LEVELS`).
        format: Version of the file that they were read from.
    """

    model: ModelFacts
    domains: tuple[str, ...]
    tokens: Float64[ndarray, " domains"]
    experts: dict[str, Float64[ndarray, "domains layers experts"]]
    layers: dict[str, Float64[ndarray, "domains layers"]]
    runs: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Float64[ndarray, "..."]] = field(default_factory=dict)
    halves: dict[str, Float64[ndarray, "..."]] = field(default_factory=dict)
    statistics: str = "standard"
    format: int = stats_file.FORMAT

    @classmethod
    def zeros(
        cls,
        model: ModelFacts,
        *,
        domains: Sequence[str],
        sums: Sequence[str] | None = None,
        statistics: str = "standard",
        halves: bool = False,
    ) -> Stats:
        """Statistics of no text.

        Args:
            model: The model.
            domains: Names of the text domains.
            sums: Names of the quantities that the model gives; by default all those of the level. Those over hidden
                states are made when the first of them is added, which is when their size is known.
            statistics: The level.
            halves: Whether the even and the odd rows are told apart.
        """
        names = at_level(statistics) if sums is None else [name for name in at_level(statistics) if name in sums]
        stats = cls(model, tuple(domains), np.zeros(len(domains)), {}, {}, statistics=statistics)
        for name in names:
            quantity = QUANTITIES[name]
            if "hidden" not in quantity.axes:
                stats.group(name)[name] = np.zeros(quantity.shape(model, domains=len(domains)))
                if halves and quantity.halved:
                    stats.halves[name] = np.zeros((2, *stats.experts[name].shape))
        if halves:
            stats.halves["tokens"] = np.zeros((2, len(domains)))
        return stats

    def save(self, path: Path) -> None:
        """Write a safetensors file in one step: arrays as named, the rest as JSON in its metadata."""
        header = {
            "format": stats_file.FORMAT,
            "statistics": self.statistics,
            "model": self.model.model_dump(mode="json"),
            "domains": list(self.domains),
            "runs": self.runs,
        }
        stats_file.write(path, header, dict(self.arrays()))

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read a file that :meth:`save` wrote.

        Raises:
            StatsError: If it is missing, truncated, not a statistics file, or from a later version of moeprune.
        """
        header, arrays = stats_file.read(path)
        if missing := {"tokens", "experts.count", "layers.gate_entropy_sum"} - arrays.keys():
            raise StatsError(f"{path}: statistics without {min(missing)!r}. Calibrate again.")
        try:
            stats = cls(
                model=ModelFacts.model_validate(header["model"]),
                domains=tuple(stats_file.texts(header["domains"])),
                tokens=arrays["tokens"],
                experts={},
                layers={},
                runs=[dict(run) for run in header["runs"]],
                statistics=header.get("statistics", "standard"),
                format=header["format"],
            )
            at_level(stats.statistics)
        except (ValueError, KeyError, TypeError) as error:
            raise StatsError(f"{path}: statistics with a damaged header ({error}). Calibrate again.") from error
        for name in QUANTITIES:
            group = stats.group(name)
            key = f"{stats.group_name(name)}.{name}"
            if key in arrays:
                group[name] = arrays[key]
        stats.halves = {k.removeprefix("halves."): v for k, v in arrays.items() if k.startswith("halves.")}
        stats.check(path)
        return stats

    @staticmethod
    def group_name(name: str) -> str:
        """Which of the dictionaries a quantity is in, and how its name begins in the file."""
        return "experts" if name in EXPERT_SUMS else "layers" if name in LAYER_SUMS else "more"

    def group(self, name: str) -> dict[str, Any]:
        """The dictionary that a quantity is in."""
        return getattr(self, self.group_name(name))

    def arrays(self) -> Iterator[tuple[str, Float64[ndarray, "..."]]]:
        """Every array under its name in the file: to write them, or to add those of several ranks in place.

        Whoever changes them calls :meth:`add_up` afterwards. :func:`kind_of` says which are maxima.
        """
        yield "tokens", self.tokens
        for group in ("experts", "layers", "more", "halves"):
            for name, array in getattr(self, group).items():
                yield f"{group}.{name}", array

    def add_up(self) -> None:
        """Make every array that is halved exactly the sum of its halves, whatever the order of earlier additions."""
        for name, (even, odd) in self.halves.items():
            if name != "tokens":
                maximum = QUANTITIES[name].kind == "max"
                self.experts[name][:] = np.maximum(even, odd) if maximum else even + odd

    def half(self, parity: int) -> Stats:
        """The statistics of the even (0) or the odd (1) rows alone; they hold ``experts`` and nothing else.

        Raises:
            StatsError: If the rows were not told apart.
        """
        if not self.halves:
            raise StatsError(
                f"these statistics of {self.model.name} do not tell even from odd rows, so that nothing can be said of "
                "how well they repeat. Calibrate again."
            )
        experts = {name: array[parity] for name, array in self.halves.items() if name != "tokens"}
        return Stats(self.model, self.domains, self.halves["tokens"][parity], experts, {}, statistics=self.statistics)

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the quantities of the level that this model does not give."""
        return tuple(name for name in at_level(self.statistics) if name not in self.group(name))

    @property
    def unseen_layers(self) -> tuple[str, ...]:
        """Layers that no token was routed in, such as the vision experts of a model that was given text alone."""
        seen = self.experts["count"].sum(axis=(0, 2)) > 0
        return tuple(name for name, any_token in zip(self.model.layers, seen, strict=True) if not any_token)

    def need(self, *names: str) -> dict[str, Float64[ndarray, "..."]]:
        """Some quantities by name.

        Raises:
            StatsError: If one is not there, saying why and what to do.
        """
        for name in names:
            if name not in self.group(name):
                raise StatsError(f"{name} is needed ({QUANTITIES[name].meaning}), {self.why_absent(name)}")
        return {name: self.group(name)[name] for name in names}

    def why_absent(self, name: str) -> str:
        """Why a quantity is not here, and what to do, as the end of a sentence."""
        level = QUANTITIES[name].level
        if name not in at_level(self.statistics):
            return f"which only `moeprune calibrate --stats {level}` gives."
        if self.format < stats_file.FORMAT:
            return f"which statistics of format {self.format} do not have. Calibrate again."
        return f"which calibration does not give for {self.model.model_type}."

    def check(self, origin: Path | str) -> None:
        """Raise :class:`StatsError` if an array has another shape or a value is not finite, naming layer and expert."""
        stats_file.check_shapes(self, origin)
        stats_file.check_finite(self, origin)
        stats_file.check_halves(self, origin)

    def mixed(
        self, weights: Mapping[str, float] | None = None, *, names: Sequence[str] | None = None
    ) -> dict[str, Float64[ndarray, "layers ..."]]:
        """The expert sums over all domains.

        Args:
            weights: Share of each domain in the mix, any positive scale. Each domain's sums are first divided by its
                tokens, so a share says how often its tokens occur, however much of it was calibrated on. Without
                weights the sums are added as they are.
            names: Quantities to mix; by default all of ``experts``. Those that are kept for all domains together are
                returned as they are.

        Returns:
            For each name an array without the axis of domains; of a maximum that over the domains that take part.

        Raises:
            StatsError: If a domain is unknown, a weight is negative, no token was seen, or a quantity is not there.
        """
        share = self._shares(weights)
        arrays = self.experts if names is None else self.need(*names)
        mixed = {}
        for name, array in arrays.items():
            if "domains" not in QUANTITIES[name].axes:
                mixed[name] = array
            elif QUANTITIES[name].kind == "max":
                mixed[name] = array[share > 0].max(axis=0)
            else:
                mixed[name] = np.tensordot(share, array, axes=1)
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


def kind_of(name: str) -> str:
    """``"sum"`` or ``"max"``, for a name that :meth:`Stats.arrays` gives."""
    quantity = QUANTITIES.get(name.rpartition(".")[-1])
    return "sum" if quantity is None else quantity.kind


def check_same_model(parts: Sequence[Stats], *, what: str) -> None:
    """Refuse statistics of different models, which cannot be merged or compared (``what``)."""
    first = parts[0].model
    for part in parts[1:]:
        if part.model.fingerprint != first.fingerprint or part.model.layers != first.layers:
            raise StatsError(
                f"statistics of different models cannot be {what}: {first.name} ({first.fingerprint[:12]}) and "
                f"{part.model.name} ({part.model.fingerprint[:12]})."
            )


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """The statistics of one run over all texts of ``parts``. Domains of the same name are added together.

    A quantity that one part lacks is unknown for the whole and is left out, unless that part saw no token; so are the
    halves. The level is the lowest of the parts'.

    Args:
        parts: At least one; all of the same model.

    Raises:
        StatsError: If they belong to different models, or two of them saw the same text.
    """
    assert parts, "merge_stats needs at least one part"
    first = parts[0].model
    check_same_model(parts, what="merged")
    _check_counted_once(parts)
    saw = [part for part in parts if part.tokens.any()] or list(parts)
    merged = Stats.zeros(
        first,
        domains=list(dict.fromkeys(name for part in parts for name in part.domains)),
        sums=[name for name in QUANTITIES if all(name in part.group(name) for part in saw)],
        statistics=lowest(part.statistics for part in saw),
        halves=all(part.halves for part in saw),
    )
    merged.format = min(part.format for part in saw)
    for part in parts:
        merged.runs.extend(part.runs)
    for part in saw:
        _add(merged, part)
    merged.add_up()
    return merged


def _check_counted_once(parts: Sequence[Stats]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for place, part in enumerate(parts, start=1):
        for domain, text in ((name, sha) for run in part.runs for name, sha in run.get("text", {}).items()):
            before, name = seen.setdefault(text, (place, domain))
            if before != place:
                raise StatsError(
                    f"the text of {domain!r} in statistics {place} of {len(parts)} is that of {name!r} in statistics "
                    f"{before}: merged, it would count twice. Leave one of them out."
                )


def _add(merged: Stats, part: Stats) -> None:
    at = [merged.domains.index(name) for name in part.domains]
    merged.tokens[at] += part.tokens
    for name in at_level(merged.statistics):
        if name not in part.group(name) or ("hidden" not in QUANTITIES[name].axes and name not in merged.group(name)):
            continue
        array = part.group(name)[name]
        into = merged.group(name).setdefault(name, np.zeros(array.shape))
        index: Any = at if "domains" in QUANTITIES[name].axes else slice(None)
        into[index] = np.maximum(into[index], array) if kind_of(name) == "max" else into[index] + array
    for name, into in merged.halves.items():
        array = part.halves[name]
        into[:, at] = np.maximum(into[:, at], array) if kind_of(name) == "max" else into[:, at] + array
