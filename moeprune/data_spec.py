"""How a user names calibration text. Imports nothing heavy: recipes and the command line share it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeprune.errors import DataError, did_you_mean
from moeprune.resources import DEMO, DEMO_DIR

LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}
QUERY_KEYS = ("column", "split", "subset", "tokens")


class DataSpec(BaseModel):
    """One named domain of calibration text.

    Attributes:
        domain: Its name in the statistics; by default the file's stem or the data set's name.
        source: A local .jsonl, .json, .parquet or .txt file, a data set id on the Hub, or ``demo`` (see
            :func:`expand_demo`).
        subset: The Hub data set's configuration.
        split: The split to read.
        column: The column with text or with chat messages; by default the first known name that exists.
        tokens: Budget for this domain; by default the run's budget.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    domain: str = ""
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    tokens: int | None = Field(default=None, gt=0)

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.domain or Path(self.source).stem

    @property
    def local_format(self) -> str | None:
        """The builder of `datasets` that reads the local file, or None for a data set of the Hub."""
        return LOCAL_FORMATS.get(Path(self.source).suffix.lower()) if Path(self.source).is_file() else None


def parse_data_spec(text: str, *, column: str | None = None) -> DataSpec:
    """Read ``[DOMAIN=]SOURCE[?key=value&...]`` as given on the command line.

    Args:
        text: For example ``code=my_code.jsonl``, ``math=org/dataset?subset=main&split=test&tokens=65536``.
        column: Column for specs that name none.

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
    try:
        return DataSpec.model_validate({"column": column, **values, "source": source, "domain": domain})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"--data {text}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


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
