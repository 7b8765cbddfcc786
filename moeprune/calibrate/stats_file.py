"""The statistics file, and what makes one unfit to be used. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as encode

from moeprune.calibrate.quantities import QUANTITIES
from moeprune.errors import StatsError
from moeprune.files import parse_json, replacing

if TYPE_CHECKING:
    from moeprune.calibrate.stats import Stats

FORMAT = 2
"""Format 1 had neither halves nor levels, and fewer quantities."""

Arrays = dict[str, Float64[ndarray, "..."]]


def write(path: Path, header: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a safetensors file in one step, with ``header`` as JSON in its metadata."""
    with replacing(path) as temporary:
        # Not save_file: it makes files that only their owner can read, and statistics are there to be shared.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        temporary.write_bytes(encode(contiguous, {"moeprune": json.dumps(header)}))


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The header and the arrays of a file that :func:`write` wrote.

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
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StatsError(f"{path}: not a complete statistics file ({error}). Calibrate again.") from error


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


def texts(values: Any) -> list[str]:
    """A list of texts from JSON.

    Raises:
        TypeError: If it is anything else; a text alone is a sequence of texts to Python.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of names, got {values!r}")
    return values


def check_shapes(stats: Stats, origin: Path | str) -> None:
    """Refuse an array that is not over what its name says, or has another dtype than all statistics."""
    domains = len(stats.domains)
    if len(set(stats.domains)) < domains:
        raise StatsError(f"{origin}: two domains of the same name, {list(stats.domains)}. Calibrate again.")
    for key, array in stats.arrays():
        group, _, name = key.rpartition(".")
        if name == "tokens":
            expected = (domains,)
        elif name in QUANTITIES:
            hidden = array.shape[-1] if array.ndim else 0
            expected = QUANTITIES[name].shape(stats.model, domains=domains, hidden=hidden)
        else:
            raise StatsError(f"{origin}: {key} is no quantity that moeprune knows. Calibrate again.")
        expected = (2, *expected) if group == "halves" else expected
        if array.shape != expected:
            raise StatsError(f"{origin}: {name} has shape {list(array.shape)}, expected {list(expected)}.")
        if array.dtype != np.float64:
            raise StatsError(f"{origin}: {name} is {array.dtype}, expected float64. Calibrate again.")


def check_finite(stats: Stats, origin: Path | str) -> None:
    """Refuse a value that is not finite, naming layer, expert and domain as far as the array is over them."""
    if not np.isfinite(stats.tokens).all():
        raise StatsError(f"{origin}: the number of tokens by domain is {stats.tokens.tolist()}. Calibrate again.")
    found: list[tuple[dict[str, int], str]] = []
    for name, quantity in QUANTITIES.items():
        array = stats.group(name).get(name)
        # One value that is not finite makes the sum so, and no array of that size has to be written for it.
        if array is None or np.isfinite(array.sum()) or np.isfinite(array).all():
            continue
        indices = np.argwhere(~np.isfinite(array))
        first = indices[np.argmin(indices[:, quantity.axes.index("layers")])]
        found.append((dict(zip(quantity.axes, map(int, first), strict=True)), name))
    if found:
        # What is wrong in one layer makes all layers after it wrong, too.
        place, name = min(found, key=lambda one: one[0]["layers"])
        where = stats.model.layers[place["layers"]]
        where += f" expert {place['experts']}" if "experts" in place else ""
        where += f" in domain {stats.domains[place['domains']]!r}" if "domains" in place else ""
        raise StatsError(
            f"{origin}: {name} of {where} is {stats.group(name)[name][tuple(place.values())]}. The model overflows on "
            "this text; calibrate in another dtype."
        )


def check_halves(stats: Stats, origin: Path | str) -> None:
    """Refuse halves that are not there for every quantity, or do not add up to the whole."""
    if not stats.halves:
        return
    wholes = {"tokens": stats.tokens, **stats.experts}
    if stats.halves.keys() != wholes.keys():
        raise StatsError(f"{origin}: halves of other quantities than the whole has. Calibrate again.")
    for name, (even, odd) in stats.halves.items():
        whole = np.maximum(even, odd) if name in QUANTITIES and QUANTITIES[name].kind == "max" else even + odd
        if not np.array_equal(whole, wholes[name]):
            raise StatsError(f"{origin}: the halves of {name} do not add up to the whole. Calibrate again.")
