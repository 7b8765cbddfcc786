"""docs/recipes.md is what the recipe's models take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from moeprune.cli import app
from moeprune.deploy.serving import VERSIONS
from moeprune.recipe import SECTIONS, Recipe, load_recipe
from moeprune.recipe_keys import EXAMPLE, REQUIRED, TITLES, Key, keys, markdown

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "python -m moeprune.recipe_keys > docs/recipes.md"


def test_the_example_is_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(EXAMPLE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [plan.name for plan in recipe.plans] == ["topk-6", "reap-75", "soft-frequency-75", "small"]


def test_every_section_and_every_key_is_explained():
    assert TITLES.keys() | {("calibrate", "self_generate")} == SECTIONS.keys()
    found = list(keys())
    assert len(found) == sum(len(SECTIONS[section].model_fields) for section in TITLES)
    assert all(key.value and key.meaning.endswith(".") for key in found), "each has a line in its model's docstring"
    assert {row.count(" | ") for row in markdown().splitlines() if row.startswith("| `")} == {3}
    assert {engine for engine in VERSIONS if f"`{engine}`" in markdown()} == set(VERSIONS)


MISSING = object()


def example(key: Key, value: Any = MISSING) -> dict[str, Any]:
    """The example's recipe with every default filled in, without a key or with a value for it."""
    recipe = yaml.safe_load(EXAMPLE)
    place = recipe
    for section in key.section:
        place = place[section][0] if isinstance(place[section], list) else place[section]
    place.pop(key.name, None)
    if value is not MISSING:
        place[key.name] = value
    return Recipe.model_validate(recipe).model_dump()


@pytest.mark.parametrize("key", [key for key in keys() if key.default not in ("", REQUIRED)], ids=lambda key: key.path)
def test_a_default_of_the_table_may_as_well_be_written(key):
    assert example(key, yaml.safe_load(key.default.strip("`"))) == example(key)


@pytest.mark.parametrize("key", [key for key in keys() if " above " in key.value], ids=lambda key: key.path)
def test_a_limit_of_the_table_is_one(key):
    limit = 1 if "above 1" in key.value else 0
    with pytest.raises(ValidationError, match=f"greater than {limit}"):
        example(key, limit)


def test_the_keys_and_the_rules_of_engines_are_listed_on_the_command_line():
    listed = CliRunner().invoke(app, ["ls", "keys"], catch_exceptions=False).stdout
    assert "calibrate.data.source" in listed and "whole number above 0 [default: 65536]" in listed
    rows = json.loads(CliRunner().invoke(app, ["ls", "engines", "--json"], catch_exceptions=False).stdout)
    assert {row["severity"] for row in rows} >= {"error", "warning"}
