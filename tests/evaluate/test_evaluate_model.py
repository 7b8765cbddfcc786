import copy
import logging
import math
import random
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeprune.errors import EvaluationError
from moeprune.evaluate import compare, evaluate_model, results_table


def run(model, tokenizer, folder, tasks, **changes):
    settings = {"limit": None, "batch_size": 4, "seed": 0, "name": "m", "quiet": True} | changes
    return evaluate_model(model, tokenizer=tokenizer, tasks=tasks, include_path=folder, **settings)


def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """One sequence at a time, in float64 after the logits."""
    with torch.no_grad():
        log_probs = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def right_choices(model, tokenizer, rows) -> list[float]:
    values = []
    for row in rows:
        context = tokenizer.encode(row["question"])
        scores = []
        for choice in row["choices"]:
            whole = tokenizer.encode(f"{row['question']} {choice}")
            assert whole[: len(context)] == context
            scores.append(log_likelihood(model, context, whole[len(context) :]))
        values.append(float(scores.index(max(scores)) == row["gold"]))
    return values


@pytest.fixture(scope="module")
def result(model, tokenizer, task_folder):
    return run(model, tokenizer, task_folder, ["all", "say", "pick"])


def test_accuracy_of_each_item_is_that_of_the_raw_model(result, model, tokenizer, items):
    expected = right_choices(model, tokenizer, items["pick"])
    pick = result.tasks["pick"]
    assert 0 < sum(expected) < len(expected)
    assert (pick.metric, pick.values, pick.bytes, pick.n) == ("acc", expected, None, 14)
    assert (pick.doc_ids, pick.version, pick.num_fewshot) == (list(range(14)), "2.5", 0)
    assert pick.value == pytest.approx(sum(expected) / 14)
    assert pick.higher_is_better is True


def test_bits_of_each_document_are_those_of_the_raw_model(result, model, tokenizer, items):
    bits = [
        -log_likelihood(model, [tokenizer.eos_token_id], tokenizer.encode(row["text"])) / math.log(2)
        for row in items["read"]
    ]
    sizes = [len(row["text"].encode()) for row in items["read"]]
    read = result.tasks["read"]
    assert read.values == pytest.approx(bits, rel=1e-5)
    assert read.bytes == sizes
    assert read.value == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert (read.metric, read.higher_is_better) == ("bits_per_byte", False)


def test_generated_answers_are_the_greedy_ones(result):
    assert (result.tasks["say"].metric, result.tasks["say"].values) == ("exact_match", [0.0, 1.0, 0.0, 1.0])


def test_function_tags_work_and_groups_pool_all_items(result):
    pick, late, picks = result.tasks["pick"], result.tasks["pick_late"], result.groups["picks"]
    assert late.values == pick.values[7:]
    assert picks.tasks == ["pick", "pick_late"] and picks.n == 21
    assert picks.value == pytest.approx((sum(pick.values) + sum(late.values)) / 21)


def test_a_group_of_mixed_metrics_gives_one_result_for_each(result):
    assert {name: group.tasks for name, group in result.groups.items()} == {
        "picks": ["pick", "pick_late"],
        "all (acc)": ["pick", "pick_late"],
        "all (bits_per_byte)": ["read"],
    }
    assert result.groups["all (bits_per_byte)"].value == result.tasks["read"].value


def test_paired_differences_are_those_of_the_items(result, other_model, tokenizer, task_folder):
    other = run(other_model, tokenizer, task_folder, ["all", "say", "pick"], name="other")
    gaps = compare({"m": result, "other": other}, baseline="m")
    assert gaps.keys() == {"other"} and gaps["other"].keys() == result.tasks.keys() | result.groups.keys()
    ours, theirs = other.tasks["read"], result.tasks["read"]
    assert gaps["other"]["read"]["difference"] == pytest.approx(ours.value - theirs.value)
    assert gaps["other"]["picks"]["difference"] == pytest.approx(
        other.groups["picks"].value - result.groups["picks"].value
    )
    assert gaps["other"]["picks"]["n"] == 21
    assert "other - m" in results_table({"m": result, "other": other}, baseline="m")


def test_a_reloaded_model_scores_the_same(result, model, tokenizer, task_folder, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    again = run(reloaded, tokenizer, task_folder, ["all", "say", "pick"])
    assert again.tasks == result.tasks and again.groups == result.groups


def test_batch_size_changes_only_rounding(result, model, tokenizer, task_folder):
    single = run(model, tokenizer, task_folder, ["read"], batch_size=1)
    assert single.tasks["read"].values == pytest.approx(result.tasks["read"].values, rel=1e-5)


def test_bfloat16_log_probabilities_are_not_rounded_to_bfloat16(model, tokenizer, task_folder, items):
    half = copy.deepcopy(model).bfloat16()
    bits = run(half, tokenizer, task_folder, ["read"]).tasks["read"].values
    expected = [
        -log_likelihood(half, [tokenizer.eos_token_id], tokenizer.encode(row["text"])) / math.log(2)
        for row in items["read"]
    ]
    assert bits == pytest.approx(expected, rel=2e-3)
    assert any(value != float(torch.tensor(value).bfloat16()) for value in bits)


def test_few_shot_examples_depend_on_the_seed_alone(model, tokenizer, task_folder):
    prints = [
        run(model, tokenizer, task_folder, ["pick_shots"], seed=seed, limit=3).tasks["pick_shots"].fingerprint
        for seed in (5, 5, 6)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_limit_takes_the_first_items(result, model, tokenizer, task_folder):
    few = run(model, tokenizer, task_folder, ["pick"], limit=3)
    assert few.tasks["pick"].doc_ids == [0, 1, 2]
    assert few.tasks["pick"].values == result.tasks["pick"].values[:3]
    assert few.limit == 3


def test_tasks_run_from_any_folder(model, tokenizer, task_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(model, tokenizer, task_folder, ["read"], limit=2).tasks["read"].n == 2


def test_quiet_prints_nothing_and_leaves_everything_as_it_was(model, tokenizer, task_folder, capfd):
    model.train()
    level, states = logging.getLogger("lm_eval").level, (random.getstate(), torch.get_rng_state())
    try:
        run(model, tokenizer, task_folder, ["read", "pick"], limit=2)
        assert model.training
    finally:
        model.eval()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert sys.stderr is not None


def test_a_model_of_nan_is_refused_instead_of_scored(model, tokenizer, task_folder):
    # lm-eval takes the first choice when all log-likelihoods are NaN, and reports an ordinary-looking accuracy.
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    with pytest.raises(EvaluationError, match=r"not numbers \(item 0 of task 'pick'\)"):
        run(broken, tokenizer, task_folder, ["pick"], limit=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "Expected a limit of at least 1 item a task, got 0. Leave it out for all items."),
        ({"batch_size": 0}, "Expected a batch size of at least 1, got 0. 64 suits short items."),
        (
            {"apply_chat_template": True},
            "The chat template was asked for, but this tokenizer has none. "
            "Evaluate without it, or add one to the tokenizer.",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(model, tokenizer, task_folder, changes, message):
    with pytest.raises(EvaluationError) as error:
        run(model, tokenizer, task_folder, ["pick"], **changes)
    assert str(error.value) == message


def test_a_task_without_a_mean_metric_is_refused_before_the_model_runs(tokenizer, task_folder, model, tmp_path):
    text = (task_folder / "say.yaml").read_text().replace("data/say", str(task_folder / "data/say"))
    (tmp_path / "say.yaml").write_text(text.replace("exact_match, aggregation: mean", "bleu, aggregation: bleu"))
    with pytest.raises(EvaluationError) as error:
        run(model, tokenizer, tmp_path, ["say"])
    assert str(error.value) == (
        "The task 'say' declares no metric that is a mean over its items (it has: bleu), so models cannot be compared "
        "item by item. Leave it out, or add such a metric to its metric_list with 'aggregation: mean'."
    )


def test_a_chat_template_reaches_the_prompts(model, tokenizer, task_folder, result):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    scored = run(model, chatty, task_folder, ["pick"], apply_chat_template=True)
    assert scored.tasks["pick"].fingerprint != result.tasks["pick"].fingerprint


def test_a_damaged_data_file_is_told_as_such(model, tokenizer, task_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "say.jsonl").write_text('{"question": "a", "ans\n')
    (tmp_path / "say.yaml").write_text((task_folder / "say.yaml").read_text())
    with pytest.raises(
        EvaluationError, match=r"The data of 'say' could not be loaded: .* Correct the file if it is local"
    ):
        run(model, tokenizer, tmp_path, ["say"])
