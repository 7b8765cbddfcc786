"""Models beside one of them: paired differences on the same items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moeprune.errors import EvaluationError, did_you_mean
from moeprune.evaluate.paired import paired_difference, ratio
from moeprune.evaluate.results import GroupResult, ModelResult, TaskResult


def pool(name: str, *, tasks: Mapping[str, TaskResult]) -> dict[str, GroupResult]:
    """The score of a group: every item of its tasks counts the same, or every byte for bits per byte.

    A group whose tasks have different metrics has no single number. It then gives one result for each metric, named
    "group (metric)".

    Args:
        name: Name of the group.
        tasks: The results of its tasks.

    Returns:
        One result, or one for each metric, by name.
    """
    by_metric: dict[tuple[str, bool], list[str]] = {}
    for task, result in tasks.items():
        by_metric.setdefault((result.metric, result.higher_is_better), []).append(task)
    pooled = {}
    for (metric, higher_is_better), members in by_metric.items():
        values, weights = _joined([tasks[member] for member in members])
        value, stderr = ratio(values, weights=weights)
        label = name if len(by_metric) == 1 else f"{name} ({metric})"
        pooled[label] = GroupResult(
            metric=metric,
            value=value,
            stderr=stderr,
            n=len(values),
            higher_is_better=higher_is_better,
            tasks=members,
        )
    return pooled


def compare(
    results: Mapping[str, ModelResult], *, baseline: str
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Paired differences from the baseline, by task and by group.

    Args:
        results: The results by model name, the baseline among them.
        baseline: The name of the model to subtract.

    Returns:
        ``{model: {task or group: {"difference", "stderr", "n"}}}`` for every model but the baseline: model minus
        baseline in the unit of the metric, its paired standard error (None for fewer than two items) and the number of
        items. Whether a positive difference is good is told by ``higher_is_better`` of the result.

    Raises:
        EvaluationError: The baseline is not among the results, or two results are not about the same items.
    """
    if baseline not in results:
        raise EvaluationError(f"No result of the baseline {baseline!r}. {did_you_mean(baseline, results)}")
    reference = results[baseline]
    for name, result in results.items():
        _refuse_unpaired(result, reference, names=(name, baseline))
    return {name: _differences(result, reference) for name, result in results.items() if name != baseline}


def _differences(result: ModelResult, reference: ModelResult) -> dict[str, dict[str, float | int | None]]:
    members = {task: [task] for task in reference.tasks}
    members |= {group: pooled.tasks for group, pooled in reference.groups.items()}
    differences = {}
    for label, tasks in members.items():
        values, weights = _joined([result.tasks[task] for task in tasks])
        baseline, _ = _joined([reference.tasks[task] for task in tasks])
        difference, stderr = paired_difference(values, baseline=baseline, weights=weights)
        differences[label] = {"difference": difference, "stderr": stderr, "n": len(values)}
    return differences


def _joined(results: Iterable[TaskResult]) -> tuple[list[float], Sequence[float] | None]:
    """Values and weights of several tasks with one metric, one after the other."""
    values: list[float] = []
    weights: list[float] = []
    weighted = False
    for result in results:
        values += result.values
        weights += result.bytes or []
        weighted = result.bytes is not None
    return values, weights if weighted else None


def _refuse_unpaired(result: ModelResult, reference: ModelResult, *, names: tuple[str, str]) -> None:
    remedy = (
        "Evaluate both again with the same tasks, limit and settings; a cached result of other settings must go first."
    )
    start = f"Results of {names[0]!r} and {names[1]!r} cannot be paired: "
    for setting in ("limit", "apply_chat_template"):
        ours, theirs = getattr(result, setting), getattr(reference, setting)
        if ours != theirs:
            raise EvaluationError(f"{start}{setting} is {ours} for the first and {theirs} for the second. {remedy}")
    if result.tasks.keys() != reference.tasks.keys():
        lone = ", ".join(sorted(result.tasks.keys() ^ reference.tasks.keys()))
        raise EvaluationError(f"{start}only one of them has: {lone}. {remedy}")
    if _memberships(result) != _memberships(reference):
        raise EvaluationError(f"{start}their groups hold different tasks. {remedy}")
    for task, ours in result.tasks.items():
        theirs = reference.tasks[task]
        for field in ("metric", "version", "num_fewshot", "n"):
            a, b = getattr(ours, field), getattr(theirs, field)
            if a != b:
                raise EvaluationError(
                    f"{start}{field} of task {task!r} is {a} for the first and {b} for the second. {remedy}"
                )
        if (ours.doc_ids, ours.bytes, ours.fingerprint) != (theirs.doc_ids, theirs.bytes, theirs.fingerprint):
            raise EvaluationError(f"{start}task {task!r} had other items or other prompts. {remedy}")


def _memberships(result: ModelResult) -> dict[str, list[str]]:
    return {name: group.tasks for name, group in result.groups.items()}
