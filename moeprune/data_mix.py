"""Mixes: several domains of calibration text under one name, with their budgets. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeprune.data_spec import DataSpec, expand_demo
from moeprune.errors import DataError, did_you_mean
from moeprune.resources import shipped

FROM_OUTSIDE = {"source", "column", "tokens", "documents", "drop"}
"""Fields that may be given along with a mix; `column` is for other data and does not reach it."""


class Mix(BaseModel):
    """A file of ``recipes/data/``.

    Attributes:
        about: One line for ``moeprune ls data``.
        tokens: Budget that the domains with a share have together.
        domains: The domains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    tokens: int | None = Field(default=None, gt=0)
    domains: tuple[DataSpec, ...] = Field(min_length=1)


def mixes() -> dict[str, Path]:
    """The mixes that ship with moeprune, by name."""
    return {path.stem: path for path in sorted((shipped("recipes") / "data").glob("*.yaml"))}


def load_mix(path: Path) -> Mix:
    """Read a mix.

    Raises:
        DataError: If the file is not YAML or does not say what a mix must; all mistakes at once.
    """
    try:
        mix = Mix.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(mistake)}" for mistake in error.errors())
        raise DataError(f"{path}: not a mix of data:\n{lines}") from error
    shared = [spec for spec in mix.domains if spec.share is not None]
    if bool(shared) != (mix.tokens is not None):
        raise DataError(f"{path}: `tokens` of a mix are split by the shares of its domains. Give both, or neither.")
    nested = [spec.source for spec in mix.domains if mix_path(spec) is not None]
    if nested:
        raise DataError(f"{path}: a mix of mixes ({nested[0]}). Name its domains here.")
    return mix


def _explain(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"]) or "mix"
    if mistake["type"] != "extra_forbidden":
        return f"{where}: {mistake['msg'].removeprefix('Value error, ')}"
    known = DataSpec.model_fields if mistake["loc"][0] == "domains" else Mix.model_fields
    return f"{where}: unknown key. {did_you_mean(str(mistake['loc'][-1]), known)}"


def mix_path(spec: DataSpec) -> Path | None:
    """The file of the mix that a data spec names, or None. A local file of that name goes before a shipped mix."""
    path = Path(spec.source)
    if path.suffix.lower() in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"{spec.source}: no such file. `moeprune ls data` lists the mixes that ship with moeprune.")
        return path
    return None if path.is_file() else mixes().get(spec.source)


def expand_data(specs: Sequence[DataSpec], *, tokens: int) -> tuple[DataSpec, ...]:
    """Every domain that is meant: ``demo`` and mixes resolved, budgets worked out.

    Domains with a share split one budget: that of their mix, or for domains given one by one ``tokens`` for each.

    Args:
        specs: As given.
        tokens: Budget of a domain that says nothing of its own.

    Raises:
        DataError: If a mix cannot be read, or is given what only its domains have.
    """
    expanded: list[DataSpec] = []
    for spec in specs:
        path = mix_path(spec)
        expanded += expand_demo([spec]) if path is None else _domains_of(spec, load_mix(path))
    total = tokens * sum(spec.share is not None for spec in expanded)
    return tuple(_with_budget(spec, tokens) for spec in _split(expanded, total=total))


def _domains_of(spec: DataSpec, mix: Mix) -> tuple[DataSpec, ...]:
    more = spec.model_fields_set - FROM_OUTSIDE
    given = sorted(name for name in more if getattr(spec, name) != DataSpec.model_fields[name].get_default())
    if given:
        raise DataError(
            f"{spec.source}: a mix takes tokens, documents and drop; {given[0]!r} belongs to one of its domains."
        )
    if spec.tokens is not None and mix.tokens is None:
        raise DataError(f"{spec.source}: its domains have no shares of a budget. Give documents instead of tokens.")
    domains = _split(mix.domains, total=spec.tokens or mix.tokens or 0)
    domains = tuple(one.model_copy(update={"drop": (*one.drop, *spec.drop)}) for one in domains)
    if spec.documents is None:
        return domains
    limit = spec.documents
    return tuple(one.model_copy(update={"documents": min(limit, one.documents or limit)}) for one in domains)


def _split(specs: Sequence[DataSpec], *, total: int) -> tuple[DataSpec, ...]:
    whole = sum(spec.share or 0 for spec in specs)
    return tuple(
        spec
        if spec.share is None
        else spec.model_copy(update={"tokens": max(1, round(total * spec.share / whole)), "share": None})
        for spec in specs
    )


def _with_budget(spec: DataSpec, tokens: int) -> DataSpec:
    """A number of documents is a budget, too."""
    if spec.tokens is not None or spec.documents is not None:
        return spec
    return spec.model_copy(update={"tokens": tokens})
