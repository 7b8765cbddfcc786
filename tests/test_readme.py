"""The README's commands, run as they stand there, and what README and docs name: it exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from moeprune.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
DOCS[Path("README.md")] = README


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


@pytest.mark.parametrize("page", DOCS, ids=str)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    for path in re.findall(r"\]\(([^)#]+)[^)]*\)", DOCS[page]):
        assert path.startswith("http") or (ROOT / page.parent / path).exists(), path
    for recipe in re.findall(r"recipes/[\w-]+\.yaml", DOCS[page]):
        assert (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize("page", DOCS, ids=str)
def test_every_option_that_a_page_gives_to_a_command_is_one(page: Path) -> None:
    """`moeprune plan --domains` stood there, which is `--domain`."""
    known = dict(programs())
    for name, rest in re.findall(r"(?:moeprune|-m moeprune) ((?:stats )?[a-z]+)\b([^`#\n]*)", DOCS[page]):
        given = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest))
        assert name not in known or given <= known[name], f"moeprune {name}{rest}"


def programs() -> Iterator[tuple[str, set[str]]]:
    """Every command with its options."""
    commands: dict[str, Any] = dict(get_command(app).commands)
    commands |= {f"stats {name}": command for name, command in commands.pop("stats").commands.items()}
    for name, command in commands.items():
        yield name, {"--help"}.union(*([*param.opts, *param.secondary_opts] for param in command.params))


def test_every_module_that_the_architecture_names_is_there() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", DOCS[Path("docs/architecture.md")], re.MULTILINE)
    assert len(rows) >= 14
    for folder, described in rows:
        for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", described):
            assert (ROOT / "moeprune" / folder / name).exists(), f"{folder}/{name}"
