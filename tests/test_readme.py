"""The README's commands, run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeprune.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    block = re.search(r"<!-- commands:[^\n]*-->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block.group(1).strip().splitlines()


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 7
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "moeprune"
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "demo-48x6" / "moeprune.json").is_file()


def test_every_path_that_the_readme_names_exists() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for recipe in re.findall(r"recipes/[\w-]+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
    assert (ROOT / "eval" / "offline").is_dir()
