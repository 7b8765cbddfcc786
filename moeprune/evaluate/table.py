"""Results as a table that reads well in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.evaluate.compare import compare
from moeprune.evaluate.results import ModelResult

ARROWS = {True: "↑", False: "↓"}


def results_table(results: Mapping[str, ModelResult], *, baseline: str | None = None, digits: int = 4) -> str:
    """Models side by side, one row a task or group, groups first.

    Args:
        results: The results by model name, all over the same items.
        baseline: Adds a column with the paired difference from this model for every other one.
        digits: Decimal places.

    Returns:
        A Markdown table, its columns padded, each cell a value ± its standard error.

    Raises:
        EvaluationError: The results cannot be paired with the baseline's.
    """
    differences = compare(results, baseline=baseline) if baseline is not None else {}
    header = ["task", "metric", "n"]
    for name in results:
        header += [name] + ([f"{name} - {baseline}"] if name in differences else [])
    rows = [_row(label, results, differences, digits) for label in _labels(results)]
    return _markdown([header, *rows])


def _labels(results: Mapping[str, ModelResult]) -> list[str]:
    labels: dict[str, None] = {}
    for result in results.values():
        labels |= dict.fromkeys(result.groups)
    for result in results.values():
        labels |= dict.fromkeys(result.tasks)
    return list(labels)


def _row(label: str, results: Mapping[str, ModelResult], differences: Mapping[str, dict], digits: int) -> list[str]:
    scores = {name: (result.groups | result.tasks).get(label) for name, result in results.items()}
    known = next(score for score in scores.values() if score is not None)
    cells = [label, f"{known.metric} {ARROWS[known.higher_is_better]}", str(known.n)]
    for name, score in scores.items():
        cells.append("" if score is None else _with_error(f"{score.value:.{digits}f}", score.stderr, digits))
        if name in differences:
            gap = differences[name][label]
            cells.append(_with_error(f"{gap['difference']:+.{digits}f}", gap["stderr"], digits))
    return cells


def _with_error(value: str, stderr: float | None, digits: int) -> str:
    return value if stderr is None else f"{value} ± {stderr:.{digits}f}"


def _markdown(rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    # A rule needs a dash beside its colon.
    widths = [max(2, *(len(row[column]) for row in escaped)) for column in range(len(escaped[0]))]
    lines = []
    for row in escaped:
        text = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(text)} |")
    rule = [":" + "-" * (width - 1) if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)
