"""Which lm-eval tasks a name stands for, and where their data is. Loads no torch.

lm-eval reads ``data_files`` relative to the current directory. Here a relative path is also looked for beside the task:
in the folder of its YAML file, then in that folder's parents, so that a task set works from wherever it is run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import EvaluationError, MissingDependencyError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Builders of the datasets library that read local files; for any other dataset_path, data_files lie in that repository.
FILE_BUILDERS = frozenset({"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"})


@dataclasses.dataclass(frozen=True)
class TaskSelection:
    """Names that were checked, ready to load.

    Attributes:
        requested: What was asked for, without repetitions: tasks, groups or tags.
        tasks: Every task that these stand for, in order.
        manager: lm-eval's task manager, which knows them and where their data is.
    """

    requested: tuple[str, ...]
    tasks: tuple[str, ...]
    manager: TaskManager


def check_tasks(tasks: Sequence[str], *, include_path: Path | None) -> TaskSelection:
    """Refuses tasks that do not exist or lack their data, before a model is loaded.

    lm-eval's own tasks are only scanned (some seconds, once a process) when a name is not in ``include_path``; their
    data sets are not looked for.

    Args:
        tasks: Names of tasks, groups or tags.
        include_path: A folder with task YAML files, with its subfolders, searched first; None for lm-eval's own.

    Raises:
        EvaluationError: No task at all, an unknown one, no such folder, or a data file that is nowhere or empty.
        MissingDependencyError: lm-eval is not installed.
    """
    require_lm_eval()
    if isinstance(tasks, str) or not tasks:
        raise EvaluationError(f"Expected a list of task names, got {tasks!r}. Name at least one task.")
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(
            f"The task folder {include_path} does not exist. Give a folder that holds task YAML files."
        )
    requested = tuple(dict.fromkeys(tasks))
    manager, members = _expanded(requested, include_path)
    for task in members:
        manager.task_index[task] = _with_data_found(manager.task_index[task])
    return TaskSelection(requested=requested, tasks=members, manager=manager)


def require_lm_eval() -> None:
    """Refuses to go on without lm-eval.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Evaluation needs lm-eval, which is not installed. Run: pip install 'moeprune[eval]'"
        )


def _expanded(requested: Sequence[str], include_path: Path | None) -> tuple[TaskManager, tuple[str, ...]]:
    """lm-eval's task manager, knowing its own tasks only if one is asked for, and the tasks asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False)
    index = manager.task_index
    own = sorted(index)
    members = dict(pair for name in requested for pair in _members(name, None, index))
    if any(task not in index for task in members):
        for name, entry in _default_index().items():
            index.setdefault(name, entry)
        members = dict(pair for name in requested for pair in _members(name, None, index))
    for task, group in members.items():
        if task not in index:
            raise EvaluationError(_unknown(task, group=group, own=own, include_path=include_path))
    return manager, tuple(members)


@functools.cache
def _default_index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _unknown(name: str, *, group: str | None, own: Sequence[str], include_path: Path | None) -> str:
    close = difflib.get_close_matches(name, _default_index(), n=3, cutoff=0.75)
    builtin = f" Close names among lm-eval's own tasks: {', '.join(close)}." if close else ""
    what = f"Unknown task {name!r}" + (f", which the group {group!r} names" if group is not None else "")
    if include_path is None:
        return (
            f"{what}: lm-eval has no task, group or tag of this name.{builtin} "
            "List them with 'lm-eval ls tasks', or give the folder of your own task YAML files."
        )
    broken = "".join(f" {path} could not be read: {reason}." for path, reason in _unreadable(include_path))
    return (
        f"{what}: neither in {include_path} nor among lm-eval's own tasks. {did_you_mean(name, own)}{builtin}{broken}"
    )


def _unreadable(folder: Path) -> Iterator[tuple[Path, str]]:
    """YAML files that lm-eval left out without a word, with the reason."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            yield path, " ".join(str(error).split())


def _members(name: str, group: str | None, index: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The tasks that a name stands for, each with the group that names it; an unknown name stands for itself."""
    from lm_eval.tasks._index import Kind

    entry = index.get(name)
    if entry is not None and entry.kind is Kind.TAG:
        yield from ((task, name) for task in sorted(entry.tags))
    elif entry is not None and entry.kind is Kind.GROUP:
        yield from _group_members(name, entry.cfg or {}, index)
    else:
        yield name, group


def _group_members(group: str, config: dict[str, Any], index: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    for item in config.get("task") or []:
        name = item if isinstance(item, str) else item.get("group", item.get("task"))
        if name not in index and isinstance(item, dict) and "group" in item:
            yield from _group_members(f"{group}::{name}", item, index)
        elif name in index or isinstance(item, str) or not {"dataset_path", "custom_dataset", "class"} & item.keys():
            yield from _members(name, group, index)


def _with_data_found(entry: Any) -> Any:
    """The entry with the paths of its data made absolute; unchanged when it reads no local files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = entry.cfg or {}
    arguments = config.get("dataset_kwargs") or {}
    files = arguments.get("data_files")
    if entry.yaml_path is None or files is None or config.get("dataset_path") not in FILE_BUILDERS:
        return entry
    found = _found(files, task=entry.name, yaml_path=entry.yaml_path)
    # lm-eval reads the YAML file again when it builds a task, unless the entry has a complete config and no file.
    complete = load_yaml(entry.yaml_path, resolve_func=True) | {"dataset_kwargs": arguments | {"data_files": found}}
    return dataclasses.replace(entry, yaml_path=None, cfg=complete)


def _found(files: Any, *, task: str, yaml_path: Path) -> Any:
    """The same structure (a path, a list or a mapping from split) with each path absolute."""
    if isinstance(files, dict):
        return {split: _found(path, task=task, yaml_path=yaml_path) for split, path in files.items()}
    if isinstance(files, list):
        return [_found(path, task=task, yaml_path=yaml_path) for path in files]
    if "://" in files:
        return files
    places = [Path.cwd(), *yaml_path.resolve().parents]
    for place in places:
        if (place / files).is_file() and (place / files).stat().st_size == 0:
            raise EvaluationError(f"The data file {place / files} of task {task!r} is empty. Make it again.")
        if (place / files).exists() or ("*" in files and any(place.glob(files))):
            return str(place / files)
    raise EvaluationError(
        f"The data file {files} of task {task!r} does not exist: neither in the current directory {places[0]} "
        f"nor in {places[1]} (where {yaml_path.name} lies) or one of its parents. "
        "Make the file, or correct data_files in the YAML file."
    )
