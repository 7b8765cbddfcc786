"""What may be written in a recipe, as a table: ``docs/recipes.md`` and ``moeprune ls keys``. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator

from moeprune.recipe import SECTIONS

PAGE = """# Recipes

A recipe is a YAML file that says what `moeprune run` does. A key that is not listed here, or given twice, is refused
with the nearest one that is; so are values that do not fit, all of them at once and before anything runs.

```yaml
{example}```

`moeprune run my.yaml --out runs/mine --dry-run` prints the recipe with all defaults filled in, and what is to be done.
`moeprune ls recipes` lists those that ship with moeprune, which `moeprune run` takes by their names.

- **Lists are crossed.** `score: [reap, random]` with `keep: [0.75, 0.5]` is four variants; each is named after what it
  changes, such as `reap-75` or `reap-75-topk-6`. The original is measured beside them.
- **Paths** are relative to the folder that the command is run in.
- **What is done again.** The run folder remembers a fingerprint of what each stage depends on: model, text, the keys of
  its section, the plans before it. The same command goes on where a run was stopped and repeats what a changed recipe
  affects: another `keep` or `for` makes plans and what follows from them anew, from the same statistics.
- **The run folder** holds `recipe.yaml` (all defaults filled in), `stats.safetensors`, `plans/NAME.json`,
  `eval/NAME.json` and `eval.json`, `throughput.json`, for the exported variant `checkpoint/`, `plan.json`,
  `verify.json` and `after.safetensors` (its routers on the same text), `report.html`, `report.md`, `report.json`, and
  `run.json`, its memory.
- **How** it is run is no part of it: `--device`, `--quiet`, `--force` are options of the command.

This page is generated: `python -m moeprune.recipe_keys > docs/recipes.md`.
"""

EXAMPLE = """\
model: org/name                       # or a folder, or demo
calibrate:
  data:
    - {domain: code, source: my_code.jsonl, tokens: 262144}
    - {domain: chat, source: org/dataset, column: messages, tokens: 131072}
variants:
  - {top_k: 6}                                    # fewer active experts
  - {score: [reap, soft-frequency], keep: 0.75}   # fewer experts, by two criteria
  - {name: small, keep: 0.5, domains: {code: 0.8, chat: 0.2}}
for: {engine: vllm, ep: 8}            # take numbers of experts that it can split eight ways
export: small
evaluate: {tasks: offline_choice, limit: 100}
throughput: {batch: 8}
"""

TITLES = {
    (): "Top level",
    ("calibrate",): "`calibrate`",
    ("calibrate", "data"): "`calibrate.data` and `calibrate.self_generate`",
    ("variants",): "`variants`",
    ("for",): "`for`",
    ("evaluate",): "`evaluate`",
    ("throughput",): "`throughput`",
}


REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        section: Where it stands, such as ``("calibrate", "data")``.
        name: As it is written.
        value: What it takes.
        default: What it is where it is missing: JSON, or ``required``.
        meaning: One sentence or two.
    """

    section: tuple[str, ...]
    name: str
    value: str
    default: str
    meaning: str

    @property
    def path(self) -> str:
        """The whole name, such as ``calibrate.data.source``."""
        return ".".join((*self.section, self.name))


def keys() -> Iterator[Key]:
    """Every key, section by section."""
    for section in TITLES:
        model = SECTIONS[section]
        meanings, schema = _meanings(model), model.model_json_schema(by_alias=True)
        for name, field in model.model_fields.items():
            written = field.alias or name
            described = schema["properties"][written]
            yield Key(
                section=section,
                name=written,
                value=_value(described, alone=any(isinstance(one, BeforeValidator) for one in field.metadata)),
                default=REQUIRED if written in schema.get("required", ()) else _default(described),
                meaning=meanings[name],
            )


def markdown() -> str:
    """The page."""
    parts = [PAGE.format(example=EXAMPLE)]
    found = list(keys())
    for section, title in TITLES.items():
        rows = [key for key in found if key.section == section]
        parts.append(f"## {title}\n")
        parts.append(f"{_first_sentences(SECTIONS[section])}\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|")
        parts += [f"| `{key.name}` | {key.value} | {key.default} | {key.meaning} |" for key in rows]
        parts.append("")
    return "\n".join(parts)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The attributes of a docstring, by name."""
    _, _, attributes = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    pairs = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: _plain(" ".join(text.split())) for name, text in pairs}


def _first_sentences(model: type[BaseModel]) -> str:
    said = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[0]
    return _plain(" ".join(said.split()))


def _plain(text: str) -> str:
    """Without the roles of reStructuredText, and fit for a cell."""
    text = re.sub(r" \((?:see )?:\w+:`[^`]*`\)", "", text)
    return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")


def _value(schema: dict[str, Any], *, alone: bool = False) -> str:
    """A JSON schema in words; of a list whether one value may stand ``alone``."""
    if "anyOf" in schema:
        return " or ".join(_value(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return "mapping"
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        inner = _value(schema["items"])
        return f"{inner}, or a list" if alone else f"list of {inner}s"
    if kind == "object":
        return "names with values"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    limits = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "up to"}
    return " ".join([words[str(kind)], *(f"{word} {schema[key]:g}" for key, word in limits.items() if key in schema)])


def _default(schema: dict[str, Any]) -> str:
    value = schema.get("default")
    if value in (None, "", [], [None]):
        return ""
    one = value[0] if isinstance(value, list) else value
    return f"`{str(one).lower() if isinstance(one, bool) else one}`"


if __name__ == "__main__":
    print(markdown(), end="")
