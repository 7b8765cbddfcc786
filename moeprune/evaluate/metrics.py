"""Which of a task's metrics is its score, and what each item contributed to it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeprune.errors import EvaluationError
from moeprune.evaluate.paired import ratio
from moeprune.evaluate.results import TaskResult

if TYPE_CHECKING:
    from lm_eval.api.task import Task

BITS_PER_BYTE = "bits_per_byte"
# These give each document's (log-likelihood, bytes), from which bits per byte follows.
BYTE_METRICS = (BITS_PER_BYTE, "byte_perplexity")
PREFERRED = {"multiple_choice": "acc", "loglikelihood": "acc", "generate_until": "exact_match"}


@dataclasses.dataclass(frozen=True)
class PrimaryMetric:
    """The metric by which a task is scored.

    Attributes:
        name: What is reported.
        source: The metric of lm-eval whose per-item values it is made from.
        higher_is_better: The direction that the task states.
    """

    name: str
    source: str
    higher_is_better: bool


def primary_metric(task: Task) -> PrimaryMetric:
    """Chooses a task's metric.

    Rule: bits_per_byte for loglikelihood_rolling tasks; acc for multiple_choice and loglikelihood tasks and exact_match
    for generate_until tasks, when the task declares it as a mean over items; otherwise the first metric that it
    declares as a mean over items. Metrics that are no mean (F1 over the whole set, BLEU, perplexity) have no per-item
    values to pair and are never chosen.

    Raises:
        EvaluationError: The task declares no such metric.
    """
    from lm_eval.api.metrics import mean

    declared: dict[str, Any] = task.aggregation() or {}
    directions: dict[str, Any] = task.higher_is_better() or {}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        source = next((metric for metric in BYTE_METRICS if metric in declared), None)
        if source is not None:
            return PrimaryMetric(BITS_PER_BYTE, source, higher_is_better=False)
    means = [metric for metric, aggregation in declared.items() if aggregation is mean]
    if not means:
        raise EvaluationError(
            f"The task {task.task_name!r} declares no metric that is a mean over its items (it has: "
            f"{', '.join(declared) or 'none'}), so models cannot be compared item by item. Leave it out, or add such a "
            "metric to its metric_list with 'aggregation: mean'."
        )
    preferred = PREFERRED.get(str(task.OUTPUT_TYPE), "")
    name = preferred if preferred in means else means[0]
    return PrimaryMetric(name, name, higher_is_better=bool(directions.get(name, True)))


def task_result(task: Task, *, metric: PrimaryMetric, samples: Iterable[Mapping[str, Any]]) -> TaskResult:
    """One task's score from the samples that lm-eval logged.

    A task with several filters logs each document once a filter; its first filter counts.

    Args:
        task: The task.
        metric: What :func:`primary_metric` chose for it.
        samples: lm-eval's logged samples of this task.

    Raises:
        EvaluationError: An item has no value, or the model's log-likelihoods are not numbers.
    """
    rows = _first_filter(samples, metric=metric, task=task.task_name)
    _refuse_nan(rows, task=task.task_name)
    scores = [row[metric.source] for row in rows]
    sizes = None
    if metric.name == BITS_PER_BYTE:
        sizes = [int(size) for _, size in scores]
        scores = [-loglikelihood / math.log(2) for loglikelihood, _ in scores]
    values = [float(score) for score in scores]
    value, stderr = ratio(values, weights=sizes)
    return TaskResult(
        metric=metric.name,
        value=value,
        stderr=stderr,
        n=len(values),
        higher_is_better=metric.higher_is_better,
        version=str(task.VERSION),
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        fingerprint=_fingerprint(rows),
        doc_ids=[int(row["doc_id"]) for row in rows],
        values=values,
        bytes=sizes,
    )


def _first_filter(samples: Iterable[Mapping[str, Any]], *, metric: PrimaryMetric, task: str) -> list[Mapping[str, Any]]:
    scored = [sample for sample in samples if metric.source in sample]
    rows = [sample for sample in scored if sample["filter"] == scored[0]["filter"]]
    if not rows:
        raise EvaluationError(
            f"The task {task!r} gave no value of its metric {metric.source!r} for any item. "
            "Correct its process_results or metric_list, or leave the task out."
        )
    return sorted(rows, key=lambda row: row["doc_id"])


def _refuse_nan(rows: Sequence[Mapping[str, Any]], *, task: str) -> None:
    """Raises if a log-likelihood is NaN: lm-eval would take the first choice as the answer and report an accuracy."""
    for row in rows:
        if any(math.isnan(number) for number in _floats(row["resps"])):
            raise EvaluationError(
                f"The model's log-likelihoods are not numbers (item {row['doc_id']} of task {task!r}): it overflows or "
                "was pruned into nonsense. Run it in float32 to see which."
            )


def _floats(responses: Any) -> Iterable[float]:
    """All floats in nested lists and tuples."""
    if isinstance(responses, float):
        yield responses
    elif isinstance(responses, list | tuple):
        for response in responses:
            yield from _floats(response)


def _fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row['doc_id']} {row['doc_hash']} {row['prompt_hash']} {row['target_hash']}\n".encode())
    return digest.hexdigest()
