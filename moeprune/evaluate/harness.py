"""lm-eval in process, on a model that is already in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint.load import long_texts
from moeprune.errors import EvaluationError
from moeprune.evaluate.compare import pool
from moeprune.evaluate.metrics import primary_metric, task_result
from moeprune.evaluate.results import ModelResult
from moeprune.evaluate.tasks import TaskSelection, check_tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_model(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    name: str,
    apply_chat_template: bool = False,
    max_length: int | None = None,
    quiet: bool = False,
) -> ModelResult:
    """Runs tasks of lm-eval on a model and keeps what each item scored.

    The same items in the same order and, for the same seed, with the same few-shot examples for every model.
    Log-probabilities are computed in float32 whatever the dtype of the model. :func:`primary_metric` tells which metric
    stands for a task. Standard errors are over items, from the formulas of ``paired``.

    Args:
        model: A causal language model. It is evaluated where it is, and its training flag is restored.
        tokenizer: Its tokenizer. lm-eval gives it a padding token if it has none.
        tasks: Names of tasks, groups or tags.
        include_path: A folder with task YAML files, searched before lm-eval's own tasks; None for these only.
        limit: At most this many items a task, the first ones; None for all.
        batch_size: Sequences in a forward pass. The logits of a batch are held in float32: batch_size times the longest
            sequence times the vocabulary times 4 bytes, twice.
        seed: Seeds few-shot sampling and sampled generation.
        name: Name of the model in the result.
        apply_chat_template: Whether prompts go through the tokenizer's chat template.
        max_length: Longest input in tokens; longer ones lose their start, and rolling tasks are cut into windows of
            this length. None for the model's max_position_embeddings.
        quiet: Whether to show neither progress bars nor lm-eval's messages.

    Returns:
        The scores of all tasks, and of the groups among the requested names.

    Raises:
        EvaluationError: An unknown task, data that cannot be loaded, or a model whose log-likelihoods are not numbers.
        MissingDependencyError: lm-eval is not installed.
    """
    _refuse_settings(tokenizer, limit=limit, batch_size=batch_size, apply_chat_template=apply_chat_template)
    start = time.perf_counter()
    selection = check_tasks(tasks, include_path=include_path)
    with _quietly(quiet), _seeded(seed), _in_eval_mode(model), long_texts(tokenizer):
        loaded, members = _load(selection, seed=seed)
        metrics = {task: primary_metric(loaded[task]) for task in loaded}
        samples = _samples(
            _language_model(model, tokenizer, batch_size=batch_size, max_length=max_length),
            loaded,
            limit=limit,
            apply_chat_template=apply_chat_template,
        )
        scores = {task: task_result(loaded[task], metric=metrics[task], samples=samples[task]) for task in loaded}
    groups = {}
    for group, names in members.items():
        groups |= pool(group, tasks={task: scores[task] for task in names})
    return ModelResult(
        name=name,
        tasks=scores,
        groups=groups,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        lm_eval_version=_lm_eval_version(),
        seconds=time.perf_counter() - start,
    )


def _refuse_settings(tokenizer: Any, *, limit: int | None, batch_size: int, apply_chat_template: bool) -> None:
    if limit is not None and limit < 1:
        raise EvaluationError(f"Expected a limit of at least 1 item a task, got {limit}. Leave it out for all items.")
    if batch_size < 1:
        raise EvaluationError(f"Expected a batch size of at least 1, got {batch_size}. 64 suits short items.")
    if apply_chat_template and not tokenizer.chat_template:
        raise EvaluationError(
            "The chat template was asked for, but this tokenizer has none. "
            "Evaluate without it, or add one to the tokenizer."
        )


def _load(selection: TaskSelection, *, seed: int) -> tuple[dict[str, Task], dict[str, list[str]]]:
    """The tasks by name, and the names of the tasks in each group."""
    from datasets.exceptions import DatasetGenerationError

    tasks: dict[str, Task] = {}
    groups: dict[str, list[str]] = {}
    for name in selection.requested:
        try:
            # One name at a time: lm-eval refuses a task that is asked for both by itself and in a group.
            loaded = selection.manager.load([name])
        except (OSError, DatasetGenerationError) as error:
            # A damaged file is only told by what the library caught.
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
            raise EvaluationError(
                f"The data of {name!r} could not be loaded: {' '.join(str(reason).split())} Correct the file if it is "
                "local; a task that downloads its data needs a network or a filled cache."
            ) from error
        for task_name, task in loaded["tasks"].items():
            _prepare(task, seed=seed)
            if task_name in tasks and tasks[task_name].dump_config() != task.dump_config():
                raise EvaluationError(
                    f"The task {task_name!r} is asked for twice with different settings, the second time by {name!r}. "
                    "Evaluate the two in separate runs."
                )
            tasks.setdefault(task_name, task)
        for group_name, group in loaded.get("groups", {}).items():
            groups[group_name] = list(dict.fromkeys(task.task_name for task in group.get_all_tasks()))
    return tasks, groups


def _prepare(task: Task, *, seed: int) -> None:
    """What simple_evaluate does to a task. It is not called itself: it spends 4 seconds describing the environment."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _language_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int | None) -> Any:
    from lm_eval.models import huggingface

    # Any: the type checker follows a decorator that hides the constructor's arguments.
    hflm: Any = huggingface.HFLM
    # Without softmax_dtype a bfloat16 model's log-probabilities are rounded to three digits.
    return hflm(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, softmax_dtype="float32"
    )


def _samples(lm: Any, tasks: dict[str, Task], *, limit: int | None, apply_chat_template: bool) -> dict[str, list[dict]]:
    from lm_eval import evaluator

    # Any: the type checker follows a decorator that gives it another function's signature.
    evaluate: Any = evaluator.evaluate
    output = evaluate(
        lm,
        {"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
    )
    assert output is not None, "lm-eval returns results on rank 0, and there is one process"
    return output["samples"]


def _lm_eval_version() -> str:
    import lm_eval

    return lm_eval.__version__


@contextlib.contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds all generators that tasks and generation use, and puts them back afterwards."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _quietly(quiet: bool) -> Iterator[None]:
    """Hides progress bars and messages below errors, if asked to."""
    if not quiet:
        yield
        return
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        # lm-eval shows some of its bars whatever it is told.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
