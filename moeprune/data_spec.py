"""How a user names calibration text. Imports nothing heavy: recipes and the command line share it."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moeprune.errors import DataError, did_you_mean
from moeprune.resources import DEMO, DEMO_DIR

LOCAL_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
    ".md": "text",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz")
WILD = re.compile(r"[*?\[\]]+")


def ending(path: str | Path) -> str:
    """The ending that says how a file is read, in lower case and without that of its compression."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), ""))).suffix


def _as_tuple(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _each_as_list(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item if isinstance(item, list | tuple) else [item] for key, item in value.items()}


def _at_home(source: str) -> str:
    """No shell expands ~ behind ``NAME=`` or in a recipe."""
    return str(Path(source).expanduser()) if source.startswith("~/") else source


class DataSpec(BaseModel):
    """One named domain of calibration text.

    What a row of the data says is taken from one of: ``ids``, ``text``, ``prompt`` (with ``response`` or
    ``tool_calls``), ``column``; where none is given, from the first column with a known name.

    Attributes:
        domain: Its name in the statistics; by default the file's stem or the data set's name.
        source: A local file with an ending of :data:`LOCAL_FORMATS` (and one of :data:`COMPRESSED`), a pattern of such
            files, a folder laid out like a data set of the Hub, the id of one, ``demo`` or the name or file of a mix
            (see :func:`moeprune.data_mix.expand_data`).
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

    source: Annotated[str, AfterValidator(_at_home)] = Field(min_length=1)
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
        if self.domain:
            return self.domain
        name = WILD.sub("", Path(self.source).name)
        for end in (*COMPRESSED, *LOCAL_FORMATS):
            name = name[: -len(end)] if name.lower().endswith(end) else name
        return name.strip("-_. ") or Path(self.source).parent.name

    @property
    def local_files(self) -> tuple[Path, ...]:
        """The local files that are read, sorted; none for a data set of the Hub."""
        path = Path(self.source)
        if path.is_dir():
            found = (file for file in path.rglob("*") if file.is_file())
            return tuple(sorted(file for file in found if f"/{file.relative_to(path)}".count("/.") == 0))
        if path.is_file():
            return (path,)
        if not WILD.search(self.source):
            return ()
        found = glob.glob(self.source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        return tuple(sorted(Path(name) for name in found if Path(name).is_file()))

    @property
    def local_format(self) -> str | None:
        """The one format of local files; None for a folder, a data set of the Hub and files of another kind."""
        if Path(self.source).is_dir():
            return None
        kinds = {ending(path) for path in self.local_files}
        return LOCAL_FORMATS.get(kinds.pop()) if len(kinds) == 1 else None


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
    if separator and "/" not in domain and not Path(source).exists():  # a folder may be named date=2026-01-01
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
