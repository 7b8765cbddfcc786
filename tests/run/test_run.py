"""A recipe from end to end, again, changed, killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moeprune.errors import EvaluationError, PlanError, RecipeError
from moeprune.evaluate import ModelResult
from moeprune.recipe import Recipe, load_recipe
from moeprune.run import stages
from moeprune.run.driver import preview, run_recipe
from tests.run.conftest import make_recipe

VARIANTS = ["original", "topk-2", "reap-50", "random-50", "ean-80-topk-2"]


def run(recipe: Recipe, out: Path, **options: object) -> tuple[dict, list[str]]:
    """The facts, and the stages that were really done."""
    lines: list[str] = []
    facts = run_recipe(recipe, out=out, command="moeprune run", quiet=True, say=lines.append, **options)
    return facts, [line.partition(":")[0] for line in lines if not line.endswith("up to date")]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("finished") / "run"
    facts, done = run(make_recipe(tiny_model), out)
    assert done[0] == "calibrate" and done[-1] == "report"
    return out, facts


def test_a_run_folder_holds_every_artifact(finished: tuple[Path, dict]) -> None:
    out, facts = finished
    for name in (
        "recipe.yaml", "stats.safetensors", "plan.json", "checkpoint/config.json", "checkpoint/moeprune.json",
        "eval.json", "report.html", "report.md", "report.json", "run.json", *(f"eval/{name}.json" for name in VARIANTS),
    ):  # fmt: skip
        assert (out / name).is_file(), name
    assert [variant["name"] for variant in facts["variants"]] == VARIANTS
    assert facts["verify"]["passed"]
    assert "# tiny-moe-ean-80-topk-2\n" in (out / "checkpoint" / "README.md").read_text()
    assert (out / "stats.safetensors").stat().st_mode == (out / "eval.json").stat().st_mode  # for the same readers
    assert json.loads((out / "report.json").read_text())["variants"] == facts["variants"]
    assert load_recipe(out / "recipe.yaml").plans == make_recipe(Path(facts["model"]["name"])).plans


def test_nothing_is_done_twice(finished: tuple[Path, dict], tiny_model: Path) -> None:
    out, facts = finished
    before = (out / "stats.safetensors").stat().st_mtime_ns
    again, done = run(make_recipe(tiny_model), out)
    assert done == []
    assert again == facts
    assert (out / "stats.safetensors").stat().st_mtime_ns == before
    assert not any(preview(make_recipe(tiny_model), out=out).stages.values())


def test_a_new_variant_redoes_only_what_depends_on_it(finished: tuple[Path, dict], tiny_model: Path) -> None:
    out, _ = finished
    changed = make_recipe(tiny_model, variants=[*make_recipe(tiny_model).model_dump()["variants"], {"top_k": 1}])
    changed = Recipe.model_validate(json.loads(changed.model_dump_json()))
    ahead = preview(changed, out=out).stages
    _, done = run(changed, out)
    assert [name for name, due in ahead.items() if due] == done, "a preview names just these"
    assert done == ["plan topk-1", "evaluate topk-1", "compare", "throughput", "report"]


def test_other_calibration_text_redoes_everything_but_the_originals_scores(tiny_model: Path, tmp_path: Path) -> None:
    small = {"variants": [{"score": "reap", "keep": 0.5}], "export": None, "throughput": None}
    run(make_recipe(tiny_model, **small), tmp_path)
    other = {"calibrate": {"data": ["demo/c"], "tokens": 300, "length": 64}}
    _, done = run(make_recipe(tiny_model, **small, **other), tmp_path)
    assert "calibrate" in done and "evaluate reap-50" in done and "export" in done
    assert "evaluate original" not in done


def test_an_evaluated_plan_equals_its_exported_checkpoint(finished: tuple[Path, dict]) -> None:
    from moeprune.checkpoint.load import load_model, load_tokenizer
    from moeprune.evaluate import evaluate_model
    from moeprune.resources import shipped

    out, facts = finished
    exported = next(variant["name"] for variant in facts["variants"] if variant["exported"])
    in_memory = ModelResult.load(out / "eval" / f"{exported}.json")
    reloaded = evaluate_model(
        load_model(out / "checkpoint"), tokenizer=load_tokenizer(out / "checkpoint"), tasks=list(in_memory.tasks),
        include_path=shipped("eval") / "offline", limit=2, batch_size=16, seed=0, name="reloaded", quiet=True,
    )  # fmt: skip
    for task, result in in_memory.tasks.items():
        assert reloaded.tasks[task].values == result.values


@pytest.mark.parametrize("killed_in", ["evaluate_model", "export_checkpoint", "verify_checkpoint"])
def test_a_killed_run_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    recipe = make_recipe(tiny_model, variants=[{"score": "reap", "keep": 0.5}], export="reap-50", throughput=None)
    original, calls = getattr(stages, killed_in), []

    def killed(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == (2 if killed_in == "evaluate_model" else 1):
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(stages, killed_in, killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    monkeypatch.setattr(stages, killed_in, original)
    _, done = run(recipe, tmp_path / "run")
    assert "calibrate" not in done and "evaluate original" not in done
    assert done[-1] == "report"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_plan_edited_by_hand_is_evaluated_again(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model, variants=[{"score": "reap", "keep": 0.5}], export=None, throughput=None)
    run(recipe, tmp_path)
    path = tmp_path / "plans" / "reap-50.json"
    plan = json.loads(path.read_text())
    missing = sorted(set(range(10)) - set(plan["layers"][0]["keep"]))
    plan["layers"][0]["keep"] = sorted([*plan["layers"][0]["keep"][:-1], missing[0]])
    path.write_text(json.dumps(plan))
    _, done = run(recipe, tmp_path)
    assert "evaluate reap-50" in done and "evaluate original" not in done


def test_another_engine_makes_other_plans_of_the_same_statistics(tiny_model: Path, tmp_path: Path) -> None:
    """The variant keeps its name, so nothing but the plan tells that its scores are of another model."""

    def recipe(**engine: object) -> Recipe:
        variants = {"variants": [{"score": "reap", "keep": 0.7}], "export": None, "throughput": None}
        return make_recipe(tiny_model, **variants, **engine)

    facts, _ = run(recipe(), tmp_path)
    assert facts["variants"][1]["num_experts"] == 7 and facts["variants"][1]["warnings"] == _starved(facts)
    served = recipe(**{"for": {"engine": "vllm", "ep": 4}})
    assert preview(served, out=tmp_path).sizes["reap-70"].num_experts == 8
    facts, done = run(served, tmp_path)
    assert "calibrate" not in done and {"plan reap-70", "evaluate reap-70", "export"} <= set(done)
    assert "evaluate original" not in done
    assert facts["variants"][1]["num_experts"] == 8
    assert facts["variants"][1]["warnings"][0].startswith("chosen for vllm: 8 experts instead of 7: ")
    assert "results" in facts["variants"][1]

    unmeasured = recipe(evaluate=None)
    facts, _ = run(unmeasured, tmp_path)
    assert facts["variants"][1]["num_experts"] == 7
    assert "results" not in facts["variants"][1] and "paired" not in facts["variants"][1], "those of the other plan"
    assert "compare" not in facts["seconds"] and "calibrate" in facts["seconds"]


def _starved(facts: dict) -> list[str]:
    return [text for text in facts["variants"][1]["warnings"] if "calibration tokens" in text]


def test_force_starts_over(finished: tuple[Path, dict], tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_model, variants=[{"top_k": 2}], export=None, throughput=None, evaluate=None)
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / "leftover").write_text("old")
    _, done = run(recipe, tmp_path / "run", force=True)
    assert done[0] == "calibrate"
    assert not (tmp_path / "run" / "leftover").exists()


def test_a_dry_run_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    ahead = preview(make_recipe(tiny_model), out=tmp_path / "run")
    assert all(ahead.stages.values()) and {"calibrate", "export", "report"} <= ahead.stages.keys()
    assert {name: (size.num_experts, size.top_k) for name, size in ahead.sizes.items()} == {
        "topk-2": (10, 2), "reap-50": (5, 3), "random-50": (5, 3), "ean-80-topk-2": (8, 2),
    }  # fmt: skip
    assert not (tmp_path / "run").exists()


def refusal(recipe: Recipe, out: Path, error: type[Exception], **options: object) -> str:
    with pytest.raises(error) as caught:
        run(recipe, out, **options)
    return str(caught.value)


def test_a_folder_of_something_else_is_not_touched(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    base = f"{tmp_path}: not empty and not a run of moeprune (no run.json)."
    assert refusal(recipe, tmp_path, RecipeError) == f"{base} Choose another folder."
    forced = refusal(recipe, tmp_path, RecipeError, force=True)
    assert forced == f"{base} --force replaces only run folders; choose another folder."
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_impossible_variants_are_refused_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    name = re.escape(str(tiny_model))
    out = tmp_path / "run"
    message = refusal(make_recipe(tiny_model, variants=[{"keep_experts": 2}], export=None), out, PlanError)
    assert message == ("variant 'reap-2e': cannot route to 3 of 2 experts. Keep at least 3, or lower --top-k to 2.")
    message = refusal(make_recipe(tiny_model, variants=[{"top_k": 4}], export=None), out, PlanError)
    assert re.fullmatch(
        f"variant 'topk-4': cannot use 4 active experts: expected 1 to 3, the top-k of {name}.", message
    )
    domains = [{"keep": 0.5, "domains": {"pyton": 1.0}}]
    message = refusal(make_recipe(tiny_model, variants=domains, export=None), out, PlanError)
    assert message == ("variant 'reap-50': unknown domain 'pyton'. Did you mean 'python'? Known: german, python.")
    unknown = make_recipe(tiny_model, evaluate={"tasks": ["offline_choice_pyton"]})
    assert "Did you mean 'offline_choice_python'?" in refusal(unknown, out, EvaluationError)
    assert not out.exists()
