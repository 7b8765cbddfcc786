"""Several models, and plans that were never exported, on the same items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import EvaluationError
from moeprune.evaluate.compare import compare
from moeprune.evaluate.harness import evaluate_model
from moeprune.evaluate.results import ModelResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_side_by_side(
    models: Sequence[str],
    *,
    plans: Sequence[Path],
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str,
    quiet: bool,
) -> dict[str, ModelResult]:
    """Evaluate each model, then the first model with each plan applied in memory.

    Args:
        models: Folders, Hub ids or ``demo``.
        plans: Plans for the first model.
        tasks: Names of tasks or groups.
        include_path: Folder with task files.
        limit: Items of each task; None for all.
        batch_size: Sequences a forward pass.
        seed: Seed of lm-eval.
        dtype: As for :func:`moeprune.checkpoint.load.load_model`.
        device: Likewise.
        quiet: No progress bars.

    Returns:
        Results by name, the baseline first. Only one original and one pruned model are in memory at a time.
    """
    names = [*models, *(str(plan) for plan in plans)]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"{name} is given twice. Name each model and plan once.")
    results = {}
    for name, model, tokenizer in _loaded(models, plans, dtype=dtype, device=device):
        results[name] = evaluate_model(
            model, tokenizer=tokenizer, tasks=tasks, include_path=include_path, limit=limit, batch_size=batch_size,
            seed=seed, name=name, quiet=quiet,
        )  # fmt: skip
    return results


def side_by_side_json(results: Mapping[str, ModelResult]) -> dict[str, Any]:
    """Scores and paired differences to the first model, as plain JSON."""
    baseline = next(iter(results))
    paired = compare(results, baseline=baseline) if len(results) > 1 else {}
    return {
        "baseline": baseline,
        "models": {name: result.summary() | {"seconds": round(result.seconds, 1)} for name, result in results.items()},
        "paired": paired,
    }


def _loaded(
    models: Sequence[str], plans: Sequence[Path], *, dtype: str, device: str
) -> Iterator[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]]:
    from moeprune.anatomy.source import open_source
    from moeprune.apply.memory import apply_plan
    from moeprune.checkpoint.folder import resolve_model
    from moeprune.checkpoint.load import load_model, load_tokenizer
    from moeprune.plan.plan import Plan

    source = open_source(models[0]) if plans else None
    loaded_plans = {str(path): Plan.load(path) for path in plans}
    for plan in loaded_plans.values():
        assert source is not None
        plan.check(source.facts)
    for position, name in enumerate(models):
        path = resolve_model(name)
        model, tokenizer = load_model(path, dtype=dtype, device=device), load_tokenizer(path)
        yield name, model, tokenizer
        if position == 0 and source is not None:
            for label, plan in loaded_plans.items():
                yield label, apply_plan(model, plan=plan, anatomy=source.anatomy), tokenizer
