"""The content of ``report.json`` as types: what a report is made from.

Every optional section may be absent; its table or plot is then not there. Keys this version does not know are kept in
``report.json`` and shown nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moeprune.errors import MoePruneError, did_you_mean

FORMAT = 1
Matrix = list[list[float]]


class ReportError(MoePruneError, ValueError):
    """Facts that no report can be written from."""


class _Fact(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelFacts(_Fact):
    """The model as it was before anything was removed; its layer and expert counts and its router."""

    name: str
    source: str = ""
    model_type: str = ""
    num_layers: int | None = None
    num_moe_layers: int | None = None
    num_experts: int
    top_k: int
    router: str = ""


class CalibrationFacts(_Fact):
    """How many tokens the routers were watched on, in all and by domain."""

    tokens: int
    domains: dict[str, int] = Field(default_factory=dict)
    seconds: float | None = None


class Result(_Fact):
    """One score of one variant: ``value`` with its standard error over ``n`` items, in the metric's own unit."""

    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    higher_is_better: bool = True


class GroupResult(Result):
    """A score over several tasks."""

    tasks: list[str] = Field(default_factory=list)


class Paired(_Fact):
    """Variant minus baseline on the same items, in the metric's own unit."""

    difference: float
    stderr: float | None = None
    n: int | None = None


class Spread(_Fact):
    """Repeated measurements of a speed."""

    median: float
    min: float
    max: float
    n: int


class Throughput(_Fact):
    """Tokens per second of one engine under one load."""

    engine: str
    device: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: Spread | None = None
    decode_tokens_per_second: Spread | None = None


class Variant(_Fact):
    """One way to slim the model (or the model itself): its size and what it scored."""

    name: str
    num_experts: int
    top_k: int
    score: str | None = None
    keep: float = 1.0
    parameters: int
    active_parameters: int
    bytes: int
    results: dict[str, Result] = Field(default_factory=dict)
    groups: dict[str, GroupResult] = Field(default_factory=dict)
    paired: dict[str, Paired] = Field(default_factory=dict)
    throughput: Throughput | None = None
    exported: bool = False
    warnings: list[str] = Field(default_factory=list)


class Saliency(_Fact):
    """How much each expert matters by one criterion, layers x experts."""

    score: str
    values: Matrix


class RouterFacts(_Fact):
    """Shares of routed tokens, layers x experts: overall, by domain, and after pruning."""

    layers: list[str]
    domains: list[str] = Field(default_factory=list)
    load: Matrix
    load_by_domain: dict[str, Matrix] = Field(default_factory=dict)
    entropy: list[float] = Field(default_factory=list)
    saliency: Saliency | None = None
    kept: dict[str, list[list[int]]] = Field(default_factory=dict)
    after: dict[str, Matrix] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        experts = _row_length(self.load, len(self.layers), "load")
        for name, rows in self.load_by_domain.items():
            _expect_shape(rows, len(self.layers), experts, f"load_by_domain[{name!r}]")
        if self.saliency is not None:
            _expect_shape(self.saliency.values, len(self.layers), experts, "saliency.values")
        for name, kept in self.kept.items():
            if len(kept) != len(self.layers) or any(not 0 <= i < experts for row in kept for i in row):
                raise ValueError(f"kept[{name!r}] needs {len(self.layers)} rows of expert ids below {experts}")
        for name, rows in self.after.items():
            if name not in self.kept or [len(row) for row in rows] != [len(row) for row in self.kept[name]]:
                raise ValueError(f"after[{name!r}] needs one share for each expert of kept[{name!r}]")
        return self


class Check(_Fact):
    """One property of the exported checkpoint that was looked at."""

    name: str
    passed: bool
    detail: str = ""


class VerifyFacts(_Fact):
    """What was checked on the exported checkpoint."""

    passed: bool
    checks: list[Check] = Field(default_factory=list)


class Facts(_Fact):
    """All that a report says."""

    format: int
    title: str
    model: ModelFacts
    baseline: str
    variants: list[Variant] = Field(min_length=1)
    calibration: CalibrationFacts | None = None
    router: RouterFacts | None = None
    verify: VerifyFacts | None = None
    recipe_yaml: str | None = None
    command: str | None = None
    environment: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def original(self) -> Variant:
        """The variant that all others are compared with."""
        return next(variant for variant in self.variants if variant.name == self.baseline)

    @property
    def slimmed(self) -> list[Variant]:
        """All variants but the baseline, in the order given."""
        return [variant for variant in self.variants if variant.name != self.baseline]

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variant names must differ, got {', '.join(names)}")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is not a variant. {did_you_mean(self.baseline, names)}")
        return self


def read_facts(facts: Mapping[str, Any]) -> Facts:
    """Check the content of a ``report.json`` and give it types.

    Args:
        facts: Plain JSON values.

    Raises:
        ReportError: The format is another one, or a field is missing or of the wrong kind.
    """
    given = facts.get("format")
    if given != FORMAT:
        raise ReportError(
            f"The facts have format {given!r}, expected {FORMAT}. "
            "Write the report with the moeprune version that measured it, or measure again."
        )
    try:
        return Facts.model_validate(facts)
    except ValidationError as error:
        raise ReportError(f"The facts cannot be read: {_problems(error)}") from None


def _problems(error: ValidationError, *, shown: int = 3) -> str:
    lines = []
    for problem in error.errors()[:shown]:
        where = ".".join(str(part) for part in problem["loc"]) or "facts"
        lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ').rstrip('.')}")
    more = error.error_count() - shown
    return "; ".join(lines) + (f"; and {more} more." if more > 0 else ".")


def _row_length(rows: Matrix, count: int, name: str) -> int:
    lengths = {len(row) for row in rows}
    if len(rows) != count or len(lengths) != 1:
        raise ValueError(f"{name} needs {count} rows of equal length, got {_shape(rows)}")
    return lengths.pop()


def _expect_shape(rows: Matrix, count: int, length: int, name: str) -> None:
    if len(rows) != count or any(len(row) != length for row in rows):
        raise ValueError(f"{name} needs {count} rows of {length}, got {_shape(rows)}")


def _shape(rows: Sequence[Sequence[float]]) -> str:
    lengths = sorted({len(row) for row in rows})
    return f"{len(rows)} rows of {' or '.join(map(str, lengths)) if lengths else 'nothing'}"
