"""The recipe: lists are crossed, names are made, and every mistake is reported at once with what was meant."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from moeprune.errors import RecipeError
from moeprune.plan.uniform import make_plan
from moeprune.recipe import Recipe, dump_recipe, load_recipe
from moeprune.resources import recipes
from tests.fake_stats import facts, fake_stats

BASE = {"model": "demo", "calibrate": {"data": "demo"}, "variants": [{"keep": 0.5}]}


def recipe(**values) -> Recipe:
    return Recipe.model_validate(BASE | values)


def names(*variants: dict) -> list[str]:
    return [settings.name for settings in recipe(variants=list(variants)).plans]


@pytest.mark.parametrize("path", recipes().values(), ids=recipes())
def test_every_shipped_recipe_parses_and_begins_with_its_command(path):
    assert load_recipe(path).plans
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert any(f"moeprune run recipes/{path.name}" in line for line in head)


def test_the_shipped_recipes_are_those_of_the_folder():
    folder = Path(__file__).parents[1] / "recipes"
    assert {path.resolve() for path in recipes().values()} == {path.resolve() for path in folder.glob("*.yaml")}


def test_lists_are_crossed_in_the_order_they_are_written():
    assert names({"score": ["reap", "ean"], "keep": [0.75, 0.5], "top_k": [2, None]}) == [
        "reap-75-topk-2", "reap-75", "reap-50-topk-2", "reap-50",
        "ean-75-topk-2", "ean-75", "ean-50-topk-2", "ean-50",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ({"keep": 0.5}, "reap-50"),
        ({"keep": 0.125, "score": "ean"}, "ean-12.5"),
        ({"keep_experts": 6}, "reap-6e"),
        ({"keep_experts": 6, "top_k": 2}, "reap-6e-topk-2"),
        ({"top_k": 2}, "topk-2"),
        ({"keep": 0.5, "groups": False}, "reap-50-no-groups"),
        ({"keep": 0.5, "name": "mine.v1_a-b"}, "mine.v1_a-b"),
    ],
)
def test_names_say_what_a_variant_is(variant, name):
    assert names(variant) == [name]


def test_a_variant_becomes_the_arguments_of_its_plan():
    variant = {"keep": [0.5], "score": "random", "top_k": 2, "domains": {"code": 2}, "seed": 7}
    (settings,) = recipe(variants=[variant]).plans
    assert settings.arguments == {
        "score": "random", "keep": 0.5, "keep_experts": None, "top_k": 2, "groups": True, "mtp": "prune",
        "domains": {"code": 2.0}, "seed": 7,
    }  # fmt: skip
    plan = make_plan(fake_stats(), **settings.arguments)
    assert (plan.num_experts, plan.top_k, plan.method["seed"]) == (5, 2, 7)


def test_a_number_of_experts_replaces_the_share():
    (settings,) = recipe(variants=[{"keep_experts": 6}]).plans
    assert settings.keep is None and settings.prunes
    assert make_plan(fake_stats(), **settings.arguments).num_experts == 6


def test_the_engine_that_is_to_serve_a_model_chooses_the_number():
    made = recipe(variants=[{"keep": 0.7, "mtp": "drop"}], **{"for": {"engine": "vllm", "ep": 4}})
    (settings,) = made.plans
    plan = make_plan(fake_stats(facts(num_experts=64)), **settings.arguments, where=made.where)
    assert make_plan(fake_stats(facts(num_experts=64)), **settings.arguments).num_experts == 45
    assert (plan.num_experts, plan.mtp) == (48, "drop")  # 44 is nearer, but no multiple of 8
    assert plan.method["for"] == [{"engine": "vllm", "tp": 1, "ep": 4, "redundant": 0, "gpu": None}]


def test_lowering_the_top_k_prunes_nothing():
    lower, pruned = recipe(variants=[{"top_k": 2}, {"keep": 0.5}]).plans
    assert not lower.prunes and pruned.prunes


@pytest.mark.parametrize(
    ("variants", "export", "expected"),
    [
        ([{"keep": 0.5}], None, "reap-50"),
        ([{"keep": [0.5, 0.75]}], None, None),
        ([{"keep": [0.5, 0.75]}], "reap-75", "reap-75"),
    ],
)
def test_the_only_variant_is_exported_else_the_named_one(variants, export, expected):
    assert recipe(variants=variants, export=export).exported == expected


def test_one_source_and_a_list_of_them_mean_the_same():
    one, listed, full = (recipe(calibrate={"data": data}) for data in ("a.txt", ["a.txt"], [{"source": "a.txt"}]))
    assert one == listed == full
    mixed = recipe(calibrate={"data": ["demo/python", {"source": "a.txt", "domain": "mine", "tokens": 5}]})
    assert [spec.name for spec in mixed.calibrate.data] == ["python", "mine"]


FULL = {
    "model": "org/model", "title": "Größe", "dtype": "bfloat16", "export": "reap-6e",
    "calibrate": {
        "data": ["demo", {"source": "org/set", "domain": "math", "subset": "main", "split": "test", "tokens": 9}],
        "tokens": 100, "length": 64, "batch_size": 2, "seed": 3,
    },
    "variants": [
        {"score": ["reap", "ean"], "keep": [0.5, 0.75], "top_k": [2, None]},
        {"keep_experts": 6, "domains": {"math": 1}},
        {"name": "mine", "keep": 0.3, "seed": 4},
        {"top_k": 1, "groups": False, "mtp": "drop"},
    ],
    "for": ["vllm", {"engine": "sglang", "tp": 2, "gpu": "H200"}],
    "evaluate": {"tasks": "offline", "include": "some/folder", "limit": 5},
    "throughput": {"batch": 2},
}  # fmt: skip


@pytest.mark.parametrize("values", [BASE, FULL], ids=["short", "full"])
def test_a_dumped_recipe_is_the_same_recipe(tmp_path, values):
    """`keep_experts` was once dumped beside the default of `keep`, which is refused when it is read."""
    first = Recipe.model_validate(values)
    (tmp_path / "again.yaml").write_text(dump_recipe(first), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == first
    assert again.plans == first.plans
    assert dump_recipe(again) == dump_recipe(first)


def test_a_dumped_recipe_shows_every_default():
    dumped = yaml.safe_load(dump_recipe(recipe()))
    assert dumped["calibrate"]["tokens"] == 65_536 and dumped["dtype"] == "auto" and dumped["evaluate"] is None


def mistakes(tmp_path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    head, *lines = str(error.value).splitlines()
    assert head == f"{path}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}:"
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def changed(at: tuple, key: str, value) -> str:
    """The full recipe as YAML with one more key in the section at ``at``."""
    values = copy.deepcopy(FULL)
    section = values
    for step in at:
        section = section[step]
    section[key] = value
    return yaml.safe_dump(values)


@pytest.mark.parametrize(
    ("at", "key", "where", "meant"),
    [
        ((), "modle", "modle", "model"),
        (("calibrate",), "tokns", "calibrate.tokns", "tokens"),
        (("calibrate", "data", 1), "colum", "calibrate.data.1.colum", "column"),
        (("variants", 1), "keep_expert", "variants.1.keep_expert", "keep_experts"),
        (("evaluate",), "task", "evaluate.task", "tasks"),
        (("throughput",), "new_token", "throughput.new_token", "new_tokens"),
    ],
)
def test_an_unknown_key_at_any_level_names_the_one_that_was_meant(tmp_path, at, key, where, meant):
    (line,) = mistakes(tmp_path, changed(at, key, 1))
    assert re.fullmatch(rf"{re.escape(where)}: unknown key\. Did you mean '{meant}'\? Known: [a-z_, ]+\.", line)


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = """
modle: demo
calibrate: {data: [{source: a, colum: b}], tokens: 0}
dtype: int8
variants:
  - {keep: 1.5}
  - {score: [reap, raep]}
  - {keep: 0.5, keep_experts: 4}
  - {top_k: 0, domains: {code: -1}}
evaluate: {taks: x}
"""
    assert sorted(mistakes(tmp_path, text)) == [
        "calibrate.data.0.colum: unknown key. Did you mean 'column'? Known: column, documents, domain, drop, files, "
        "ids, min_tokens, prompt, response, share, source, split, subset, text, tokens, tool_calls, tools, where.",
        "calibrate.tokens: Input should be greater than 0",
        "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        "evaluate.taks: unknown key. Did you mean 'tasks'? Known: batch_size, include, limit, seed, tasks.",
        "evaluate.tasks: Field required",
        "model: Field required",
        "modle: unknown key. Did you mean 'model'? Known: calibrate, dtype, evaluate, export, for, model, "
        "throughput, title, variants.",
        "variants.0.keep.0: Input should be less than or equal to 1",
        "variants.1.score.1: unknown score 'raep'. Did you mean 'reap'? Known: ean, ean-mean, easy-ep, "
        "frequency, max-activations, mone, msan, random, reap, soft-frequency, weighted-ean, weighted-msan.",
        "variants.2: give keep or keep_experts, not both",
        "variants.3.domains.code: Input should be greater than or equal to 0",
        "variants.3.top_k.0: Input should be greater than 0",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"variants": [{"keep": 0.5}, {"keep": 0.5}]},
            "recipe: two variants are named 'reap-50'; give them names of their own",
        ),
        (
            {"variants": [{"name": "a", "keep": [0.5, 0.75]}]},
            "variants.0: the name 'a' stands for several variants; leave it out to have them named",
        ),
        (
            {"export": "reap-5"},
            "recipe: export names an unknown variant 'reap-5'. Did you mean 'reap-50'? Known: reap-50.",
        ),
        ({"variants": []}, "variants: Tuple should have at least 1 item after validation, not 0"),
        (
            {"calibrate": {"data": []}},
            "calibrate: no calibration text; give data (a file, a Hub id, a mix or demo) or self_generate",
        ),
        (
            {"variants": [{"score": "mone", "keep": 0.5}]},
            "recipe: the score 'mone' needs more than the standard statistics; give calibrate.statistics: merge",
        ),
        (
            {"variants": [{"score": "mone", "keep": 0.5, "domains": {"a": 1}}]},
            "variants.0: the score 'mone' cannot be told by domain; leave domains out",
        ),
        (
            {"for": "vlm"},
            "for.0: unknown engine 'vlm'. Did you mean 'vllm'? Known: llama.cpp, sglang, transformers, vllm.",
        ),
        (
            {"for": {"engine": "vllm", "pp": 2}},
            "for.0.pp: unknown key. Did you mean 'tp'? Known: engine, ep, gpu, redundant, tp.",
        ),
        ({"for": {"engine": "vllm", "tp": 0}}, "for.0: --tp 0: expected a whole number from 1."),
        (
            {"variants": [{"name": "../up", "keep": 0.5}]},
            "variants.0.name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'",
        ),
    ],
)
def test_refused_values(tmp_path, values, message):
    assert mistakes(tmp_path, yaml.safe_dump(BASE | values)) == [message]


@pytest.mark.parametrize("variant", [{}, {"keep": 1.0}, {"name": "original", "keep": 0.5}])
def test_a_variant_that_is_or_is_called_the_original(tmp_path, variant):
    assert mistakes(tmp_path, yaml.safe_dump(BASE | {"variants": [variant]})) == [
        "recipe: a variant is named 'original', or changes nothing; the original is measured in any case. "
        "Give it a name, fewer experts or a lower top_k"
    ]


@pytest.mark.parametrize("key", ["score", "keep", "top_k"])
def test_an_empty_list_does_not_silently_make_no_variant(tmp_path, key):
    (line,) = mistakes(tmp_path, yaml.safe_dump(BASE | {"variants": [{key: []}]}))
    assert line == f"variants.0.{key}: Tuple should have at least 1 item after validation, not 0"


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path}: no such recipe. `moeprune ls recipes` lists those that ship with moeprune."


def test_not_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: [unclosed\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: not YAML: while parsing a flow sequence\n")
    assert "line 1, column 8" in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfemodel")
    with pytest.raises(RecipeError, match="not YAML: 'utf-8' codec can't decode"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "3\n"])
def test_yaml_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path}: expected a mapping with keys such as model, calibrate and variants."


def test_a_key_given_twice_is_not_silently_dropped(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: demo\ncalibrate: {data: demo}\nvariants: [{top_k: 6}]\nvariants: [{top_k: 4}]\n")
    with pytest.raises(RecipeError, match=r"not YAML: the key 'variants' is given twice\n"):
        load_recipe(path)
