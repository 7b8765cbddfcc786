"""``moeprune ls``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moeprune.cli.options import Json, print_json

KINDS = "families|formats|scores|recipes|keys|tasks|data|engines"
PADDED = ("statistics", "kind", "severity")


SCORES_LEGEND = """
Experts with a larger score are kept. T: the tokens routed to the expert; f: its output; g: the weight that the model
gives this output; |.|: L2 norm; x and y: the residual stream, and what the routed experts add to it. standard, merge:
what `moeprune calibrate --stats` has to be, at least."""


def ls(
    kind: Annotated[str, typer.Argument(metavar=KINDS, help="What to list.")],
    as_json: Json = False,
) -> None:
    """List what moeprune knows: families, formats, scores, recipes and their keys, tasks, data, rules of engines.

    Example: `moeprune ls families`
    """
    from moeprune.errors import MoePruneError, did_you_mean

    listers = {
        "families": _families,
        "formats": _formats,
        "scores": _scores,
        "recipes": _recipes,
        "keys": _keys,
        "tasks": _tasks,
        "data": _data,
        "engines": _engines,
    }
    if kind not in listers:
        raise MoePruneError(f"cannot list {kind!r}. {did_you_mean(kind, listers)}")
    rows = listers[kind]()
    if as_json:
        print_json(rows)
        return
    widths = {key: max(len(str(row.get(key, ""))) for row in rows) for key in ("name", *PADDED)} if rows else {}
    for row in rows:
        typer.echo("  ".join(f"{value!s:<{widths.get(key, 0)}}" for key, value in row.items()).rstrip())
    if kind == "scores":
        typer.echo(SCORES_LEGEND)


def _families() -> list[dict[str, Any]]:
    from moeprune.families import list_families

    return [
        {"name": family.model_type, "support": "; ".join([family.router, *family.notes]) or f"no: {family.reason}"}
        for family in list_families()
    ]


def _formats() -> list[dict[str, Any]]:
    from moeprune.anatomy.formats import format_rows

    return format_rows()


def _scores() -> list[dict[str, Any]]:
    from moeprune.score import SCORES

    return [
        {
            "name": name,
            "statistics": SCORES.get(name).level,
            "formula": SCORES.get(name).formula,
            "source": SCORES.get(name).source,
        }
        for name in SCORES
    ]


def _recipes() -> list[dict[str, Any]]:
    from moeprune.resources import recipes

    return [{"name": name, "path": str(path)} for name, path in recipes().items()]


def _keys() -> list[dict[str, Any]]:
    from moeprune.recipe_keys import REQUIRED, keys

    found = []
    for key in keys():
        default = key.default.strip("`")
        taken = key.value + (f" [{default if default == REQUIRED else f'default: {default}'}]" if default else "")
        found.append({"name": key.path, "value": taken.replace("`", ""), "meaning": key.meaning.replace("`", "")})
    return found


def _engines() -> list[dict[str, Any]]:
    import moeprune.deploy.rules  # noqa: F401  # fills the table
    from moeprune.deploy.rule import RULES

    rules = [RULES.get(name) for name in RULES]
    return [
        {"name": rule.name, "severity": rule.severity, "engines": ", ".join(rule.engines), "rule": rule.summary}
        for rule in rules
    ]


def _tasks() -> list[dict[str, Any]]:
    import yaml

    from moeprune.resources import shipped

    names = []
    for file in sorted((shipped("eval") / "offline").glob("*.yaml")):
        text = yaml.safe_load(file.read_text(encoding="utf-8"))
        members = text.get("task")
        if "group" in text:
            names.append({"name": text["group"], "kind": f"group of {len(members)}"})
        else:
            names.append({"name": members, "kind": "task"})
    return names


def _data() -> list[dict[str, Any]]:
    from moeprune.data_mix import load_mix, mixes
    from moeprune.data_spec import DataSpec, expand_demo

    demo = [{"name": f"demo/{spec.domain}", "about": spec.source} for spec in expand_demo([DataSpec(source="demo")])]
    return demo + [{"name": name, "about": load_mix(path).about} for name, path in mixes().items()]
