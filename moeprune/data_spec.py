"""How a user names calibration text. Imports nothing heavy: recipes and the command line share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moeprune.errors import DataError, did_you_mean
from moeprune.resources import DEMO, DEMO_DIR

LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def _as_tuple(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _each_as_list(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item if isinstance(item, list | tuple) else [item] for key, item in value.items()}


class DataSpec(BaseModel):
    """One named domain of calibration text.

    What a row of the data says is taken from one of: ``ids``, ``text``, ``prompt`` (with ``response`` or
    ``tool_calls``), ``column``; where none is given, from the first column with a known name.

    Attributes:
        domain: Its name in the statistics; by default the file's stem or the data set's name.
        source: A local .jsonl, .json, .parquet or .txt file, a data set id on the Hub, ``demo`` or the name or file of
            a mix (see :func:`moeprune.data_mix.expand_data`).
        subset: The Hub data set's configuration.
        split: The split to read.
        files: Files of the Hub repository to read instead of what its configuration names.
        column: The column with text or with chat messages.
        prompt: The column with a user's question, answered in ``response``.
        response: The column with the answer.
        tool_calls: The column with the calls that the answer makes.
        tools: The column with the tools that a chat may call; by default ``tools``, where there is such a column.
        text: Jinja template over a row's columns, such as ``{{ problem }} {{ solution }}``.
        ids: The column with token ids of this very model.
        where: Values that columns must have; other rows are passed over.
        min_tokens: Documents with fewer tokens are passed over.
        documents: Number of documents to read; all of each, unless there is a token budget, too.
        tokens: Token budget of this domain; by default the run's.
        share: Share of the budget that all domains with a share have together.
        drop: What to leave out of chats whose template has no place for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    domain: str = ""
    subset: str | None = None
    split: str = "train"
    files: str | None = None
    column: str | None = None
    prompt: str | None = None
    response: str | None = None
    tool_calls: str | None = None
    tools: str | None = None
    text: str | None = None
    ids: str | None = None
    where: Annotated[dict[str, tuple[str | int | bool, ...]] | None, BeforeValidator(_each_as_list)] = None
    min_tokens: int = Field(default=0, ge=0)
    documents: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0)
    drop: Annotated[tuple[Literal["tools", "reasoning"], ...], BeforeValidator(_as_tuple)] = ()

    @model_validator(mode="after")
    def _check(self) -> DataSpec:
        given = [name for name in ("ids", "text", "prompt", "column") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}")
        if self.prompt is None and (self.response or self.tool_calls):
            raise ValueError("response and tool_calls go with a prompt")
        if self.tokens is not None and self.share is not None:
            raise ValueError("give tokens or share, not both")
        return self

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.domain or Path(self.source).stem

    @property
    def local_format(self) -> str | None:
        """The format of the local file, or None for a data set of the Hub."""
        return LOCAL_FORMATS.get(Path(self.source).suffix.lower()) if Path(self.source).is_file() else None


# `where` has no spelling on the command line; the other two stand before the question mark.
QUERY_KEYS = tuple(name for name in DataSpec.model_fields if name not in ("source", "domain", "where"))


def parse_data_spec(text: str, *, column: str | None = None) -> DataSpec:
    """Read ``[DOMAIN=]SOURCE[?key=value&...]`` as given on the command line.

    Args:
        text: For example ``code=my_code.jsonl``, ``math=org/dataset?subset=main&split=test&tokens=65536``.
        column: Column for specs that do not say what of a row to read.

    Raises:
        DataError: If a key is unknown or a value does not fit.
    """
    source, _, query = text.partition("?")
    domain, separator, rest = source.partition("=")
    if separator:
        source = rest
    else:
        domain = ""
    values = dict(parse_qsl(query, keep_blank_values=True))
    unknown = values.keys() - set(QUERY_KEYS)
    if unknown:
        raise DataError(f"--data {text}: unknown key {min(unknown)!r}. {did_you_mean(min(unknown), QUERY_KEYS)}")
    if values.keys().isdisjoint({"text", "prompt", "ids"}):
        values = {"column": column, **values}
    try:
        return DataSpec.model_validate({**values, "source": source, "domain": domain})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise DataError(f"--data {text}: {place}{': ' if place else ''}{said}.") from error


def expand_demo(specs: Sequence[DataSpec]) -> tuple[DataSpec, ...]:
    """Replace ``demo`` by the embedded model's calibration text, one domain a file, and ``demo/NAME`` by one of them.

    Raises:
        DataError: If there is no such domain.
    """
    files = {file.stem: str(file) for file in sorted((DEMO_DIR / "calibration").glob("*.jsonl"))}
    expanded: list[DataSpec] = []
    for spec in specs:
        kind, _, name = spec.source.partition("/")
        if kind != DEMO or Path(spec.source).is_file():
            expanded.append(spec)
        elif not name:
            expanded += [spec.model_copy(update={"source": file, "domain": stem}) for stem, file in files.items()]
        elif name in files:
            expanded.append(spec.model_copy(update={"source": files[name]}))
        else:
            raise DataError(f"{spec.source}: no such text. {did_you_mean(name, files)}")
    return tuple(expanded)
