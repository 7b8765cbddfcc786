import re

import pytest

from moeprune.errors import EvaluationError
from moeprune.evaluate import ModelResult, TaskResult, compare, results_table
from moeprune.evaluate.compare import pool
from moeprune.evaluate.paired import ratio

REMEDY = "Evaluate both again with the same tasks, limit and settings; a cached result of other settings must go first."


def task(values, *, sizes=None, **changes) -> TaskResult:
    value, stderr = ratio(values, weights=sizes)
    fields = {
        "metric": "acc" if sizes is None else "bits_per_byte", "higher_is_better": sizes is None,
        "value": value, "stderr": stderr, "n": len(values), "version": "1", "num_fewshot": 0, "fingerprint": "f",
        "doc_ids": list(range(len(values))), "values": values, "bytes": sizes,
    }  # fmt: skip
    return TaskResult(**(fields | changes))


def model(name, tasks, *, groups=None, **changes) -> ModelResult:
    pooled = {}
    for group, members in (groups or {}).items():
        pooled |= pool(group, tasks={member: tasks[member] for member in members})
    fields = {
        "name": name, "tasks": tasks, "groups": pooled, "limit": None, "seed": 0, "batch_size": 4,
        "apply_chat_template": False, "lm_eval_version": "0", "seconds": 1.5,
    }  # fmt: skip
    return ModelResult(**(fields | changes))


BASE = model(
    "base",
    {"a": task([1.0, 0.0, 1.0]), "b": task([1.0, 1.0]), "c": task([10.0, 0.1 + 0.2, 30.0], sizes=[4, 9, 16])},
    groups={"ab": ["a", "b"]},
)
PRUNED = model(
    "pruned",
    {"a": task([0.0, 0.0, 1.0]), "b": task([1.0, 0.0]), "c": task([12.0, 0.5, 33.0], sizes=[4, 9, 16])},
    groups={"ab": ["a", "b"]},
)


def test_json_round_trip_is_exact():
    assert ModelResult.from_json(BASE.to_json()) == BASE


def test_saving_leaves_one_complete_file(tmp_path):
    BASE.save(tmp_path / "deep" / "base.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["base.json"]
    assert ModelResult.load(tmp_path / "deep" / "base.json") == BASE


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "base.json"
    path.write_text(BASE.to_json().replace('"seed":0', '"seeed":0'))
    with pytest.raises(EvaluationError) as error:
        ModelResult.load(path)
    assert str(error.value) == (
        f"{path} is not an evaluation result of this version of moeprune (at seed: Field required). "
        "Delete it and evaluate again."
    )
    path.write_text(BASE.to_json()[:50])
    with pytest.raises(EvaluationError, match=re.escape(str(path))):
        ModelResult.load(path)
    with pytest.raises(EvaluationError, match=r"There is no evaluation result at .* Evaluate the model first"):
        ModelResult.load(tmp_path / "other.json")


def test_the_report_gets_scores_without_items():
    summary = BASE.summary()
    assert summary["results"]["b"] == {"metric": "acc", "value": 1.0, "stderr": 0.0, "n": 2, "higher_is_better": True}
    assert summary["groups"]["ab"].keys() == {"metric", "value", "stderr", "n", "higher_is_better", "tasks"}
    assert summary["groups"]["ab"]["value"] == 0.8


def test_differences_pair_items_across_the_tasks_of_a_group():
    gaps = compare({"base": BASE, "pruned": PRUNED}, baseline="base")["pruned"]
    assert gaps["ab"]["difference"] == pytest.approx(-2 / 5)
    assert gaps["ab"]["stderr"] == pytest.approx((2 * 0.36 + 3 * 0.16) ** 0.5 / 20**0.5)
    assert gaps["c"]["difference"] == pytest.approx((45.5 - 40.3) / 29)
    assert {name: gap["n"] for name, gap in gaps.items()} == {"a": 3, "b": 2, "c": 3, "ab": 5}


def changed(**changes) -> ModelResult:
    tasks = PRUNED.tasks | {"a": PRUNED.tasks["a"].model_copy(update=changes)}
    return PRUNED.model_copy(update={"tasks": tasks})


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (PRUNED.model_copy(update={"limit": 3}), "limit is 3 for the first and None for the second."),
        (model("pruned", {"a": PRUNED.tasks["a"]}), "only one of them has: b, c."),
        (PRUNED.model_copy(update={"groups": {}}), "their groups hold different tasks."),
        (changed(version="2"), "version of task 'a' is 2 for the first and 1 for the second."),
        (changed(num_fewshot=5), "num_fewshot of task 'a' is 5 for the first and 0 for the second."),
        (changed(fingerprint="g"), "task 'a' had other items or other prompts."),
        (changed(doc_ids=[0, 1, 3]), "task 'a' had other items or other prompts."),
    ],
)
def test_results_over_other_items_are_not_paired(other, reason):
    with pytest.raises(EvaluationError) as error:
        compare({"base": BASE, "pruned": other}, baseline="base")
    assert str(error.value) == f"Results of 'pruned' and 'base' cannot be paired: {reason} {REMEDY}"


def test_unknown_baseline_names_the_closest():
    with pytest.raises(EvaluationError) as error:
        compare({"base": BASE, "pruned": PRUNED}, baseline="bas")
    assert str(error.value) == "No result of the baseline 'bas'. Did you mean 'base'? Known: base, pruned."


def test_the_table_puts_models_side_by_side():
    assert results_table({"base": BASE, "pruned": PRUNED}, baseline="base", digits=2) == (
        "| task | metric          |  n |        base |      pruned | pruned - base |\n"
        "| :--- | :-------------- | -: | ----------: | ----------: | ------------: |\n"
        "| ab   | acc ↑           |  5 | 0.80 ± 0.20 | 0.40 ± 0.24 |  -0.40 ± 0.24 |\n"
        "| a    | acc ↑           |  3 | 0.67 ± 0.33 | 0.33 ± 0.33 |  -0.33 ± 0.33 |\n"
        "| b    | acc ↑           |  2 | 1.00 ± 0.00 | 0.50 ± 0.50 |  -0.50 ± 0.50 |\n"
        "| c    | bits_per_byte ↓ |  3 | 1.39 ± 0.64 | 1.57 ± 0.71 |  +0.18 ± 0.08 |"
    )
