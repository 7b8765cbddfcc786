import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeprune.errors import EvaluationError, MissingDependencyError
from moeprune.evaluate import tasks as tasks_module
from moeprune.evaluate.tasks import check_tasks

KNOWN = "all, pick, pick_late, pick_shots, picks, read, say"


@pytest.fixture
def folder(task_folder, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(task_folder.parents[1], tmp_path / "root")) / "sets" / "toy"


@pytest.fixture
def few_defaults(monkeypatch):
    """lm-eval's own tasks, without the seconds of scanning them."""
    monkeypatch.setattr(tasks_module, "_default_index", lambda: {"hellaswag": None, "piqa": None})


@pytest.fixture
def no_defaults(monkeypatch):
    def refuse():
        raise AssertionError("lm-eval's own tasks were scanned")

    monkeypatch.setattr(tasks_module, "_default_index", refuse)


def message(tasks, folder) -> str:
    with pytest.raises(EvaluationError) as error:
        check_tasks(tasks, include_path=folder)
    return str(error.value)


def test_groups_stand_for_their_tasks_and_defaults_are_not_scanned(task_folder, no_defaults):
    selection = check_tasks(["all", "say", "pick", "say"], include_path=task_folder)
    assert selection.requested == ("all", "say", "pick")
    assert selection.tasks == ("pick", "pick_late", "read", "say")


def test_unknown_task_names_the_closest(task_folder, few_defaults):
    assert message(["picc"], task_folder) == (
        f"Unknown task 'picc': neither in {task_folder} nor among lm-eval's own tasks. "
        f"Did you mean 'pick'? Known: {KNOWN}."
    )


def test_unknown_task_names_close_ones_of_lm_eval(task_folder, few_defaults):
    assert message(["helaswag"], task_folder) == (
        f"Unknown task 'helaswag': neither in {task_folder} nor among lm-eval's own tasks. Known: {KNOWN}. "
        "Close names among lm-eval's own tasks: hellaswag."
    )
    assert message(["helaswag"], None) == (
        "Unknown task 'helaswag': lm-eval has no task, group or tag of this name. "
        "Close names among lm-eval's own tasks: hellaswag. "
        "List them with 'lm-eval ls tasks', or give the folder of your own task YAML files."
    )


def test_unknown_member_of_a_group_is_told_with_the_group(folder, few_defaults):
    (folder / "picks.yaml").write_text("group: picks\ntask: [pick, pick_early]\n")
    assert message(["all"], folder) == (
        f"Unknown task 'pick_early', which the group 'picks' names: neither in {folder} nor among lm-eval's own tasks. "
        f"Did you mean 'pick_late'? Known: {KNOWN}."
    )


def test_a_damaged_yaml_file_is_named(folder, few_defaults):
    # lm-eval leaves such a file out and says nothing, so the task merely seems not to exist.
    (folder / "pick_late.yaml").write_text("task: [pick_late\n")
    assert f"{folder / 'pick_late.yaml'} could not be read: while parsing a flow sequence" in message(
        ["pick_late"], folder
    )


def test_missing_data_file_names_both_places(folder, no_defaults, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "data" / "pick.jsonl").unlink()
    assert message(["picks"], folder) == (
        "The data file sets/toy/data/pick.jsonl of task 'pick' does not exist: neither in the current directory "
        f"{tmp_path} nor in {folder} (where pick.yaml lies) or one of its parents. "
        "Make the file, or correct data_files in the YAML file."
    )


def test_an_empty_data_file_is_refused(folder, no_defaults):
    # The datasets library would end in a bare StopIteration.
    path = folder / "data" / "say.jsonl"
    path.write_text("")
    assert message(["say"], folder) == f"The data file {path} of task 'say' is empty. Make it again."


def test_data_in_the_current_directory_comes_first(folder, tmp_path, monkeypatch):
    near = tmp_path / "elsewhere" / "data"
    near.mkdir(parents=True)
    shutil.copy(folder / "data" / "read.jsonl", near)
    monkeypatch.chdir(near.parent)
    index = check_tasks(["pick", "read"], include_path=folder).manager.task_index
    assert index["read"].cfg["dataset_kwargs"] == {"data_files": {"test": [str(near / "read.jsonl")]}}
    assert index["pick"].cfg["dataset_kwargs"] == {"data_files": {"test": str(folder / "data" / "pick.jsonl")}}


def test_data_of_a_hub_repository_and_addresses_are_left_alone(folder):
    text = (folder / "read.yaml").read_text()
    (folder / "read.yaml").write_text(text.replace("dataset_path: json", "dataset_path: someone/texts"))
    (folder / "say.yaml").write_text(
        (folder / "say.yaml").read_text().replace("data/say.jsonl", "https://example.org/a.jsonl")
    )
    index = check_tasks(["read", "say"], include_path=folder).manager.task_index
    assert index["read"].yaml_path == folder / "read.yaml"
    assert index["say"].cfg["dataset_kwargs"] == {"data_files": {"test": "https://example.org/a.jsonl"}}


def test_no_folder_and_no_task_are_refused(task_folder, tmp_path):
    missing = tmp_path / "nowhere"
    assert message(["pick"], missing) == (
        f"The task folder {missing} does not exist. Give a folder that holds task YAML files."
    )
    assert message([], task_folder) == "Expected a list of task names, got []. Name at least one task."


def test_missing_lm_eval_names_the_extra(task_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as error:
        check_tasks(["pick"], include_path=task_folder)
    assert str(error.value) == ("Evaluation needs lm-eval, which is not installed. Run: pip install 'moeprune[eval]'")


def test_importing_loads_no_torch_and_no_lm_eval():
    code = "import sys, moeprune.evaluate; print(sorted({'torch', 'lm_eval', 'datasets'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_checking_tasks_loads_no_torch(task_folder):
    code = (
        "import sys, pathlib; from moeprune.evaluate import check_tasks; "
        f"check_tasks(['all'], include_path=pathlib.Path({str(task_folder)!r})); print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
