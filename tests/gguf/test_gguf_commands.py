"""The commands on a GGUF file, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeprune.cli import app
from moeprune.errors import ExportError, PlanError
from tests.gguf.files import FAMILIES, plan_for, write_model

FAMILY = FAMILIES["glm4moe with multi-token prediction"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model.gguf", FAMILY)
    plan_for(FAMILY).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> Result:
    return CliRunner().invoke(app, command.split(), catch_exceptions=False)


def test_export_then_verify(folder: Path) -> None:
    done = run("export model.gguf --plan plan.json --out small.gguf")
    assert done.exit_code == 0
    assert "warning: blocks [3] (multi-token prediction)" in done.stderr
    checked = run("verify small.gguf --against model.gguf --quiet --json")
    assert checked.exit_code == 0
    assert [check["passed"] for check in json.loads(checked.stdout)] == [True] * 4


def test_a_dry_run_prints_what_it_would_write(folder: Path) -> None:
    done = run("export model.gguf --plan plan.json --out small.gguf --dry-run --json")
    summary = json.loads(done.stdout)
    assert summary["target"] == "small.gguf"
    assert summary["sizes"]["bytes_after"] < summary["sizes"]["bytes_before"]
    assert not (folder / "small.gguf").exists()


def test_verify_fails_where_the_file_differs(folder: Path) -> None:
    run("export model.gguf --plan plan.json --out small.gguf")
    data = bytearray((folder / "small.gguf").read_bytes())
    data[-8] ^= 1  # before the padding of 4 bytes
    (folder / "small.gguf").write_bytes(data)
    checked = run("verify small.gguf --against model.gguf")
    assert checked.exit_code == 1
    assert "error: small.gguf: every tensor byte for byte" in checked.stderr


def test_a_plan_of_another_model_is_refused(folder: Path) -> None:
    plan_for(FAMILIES["mixtral"]).save(folder / "other.json")
    with pytest.raises(PlanError, match="the plan is for tiny"):
        run("export model.gguf --plan other.json --out small.gguf")


def test_inspect(folder: Path) -> None:
    assert "12 a block, top-3" in run("inspect model.gguf").stdout
    assert json.loads(run("inspect model.gguf --json").stdout)["num_experts"] == 12


@pytest.mark.parametrize("option", ["--link", "--jobs 2", "--max-shard-size 5GB", "--no-keep-source"])
def test_options_that_mean_nothing_for_a_gguf_file_are_refused(folder: Path, option: str) -> None:
    with pytest.raises(ExportError, match=f"^{option.split()[0]}: not for a GGUF file"):
        run(f"export model.gguf --plan plan.json --out small.gguf {option}")


def test_dropping_multi_token_prediction_is_refused_and_not_ignored(folder: Path) -> None:
    with pytest.raises(PlanError, match="blocks are not taken out of a GGUF file"):
        run("export model.gguf --plan plan.json --out small.gguf --mtp drop")


def test_the_suffix_may_be_written_in_capitals(folder: Path) -> None:
    (folder / "model.gguf").rename(folder / "MODEL.GGUF")
    assert run("export MODEL.GGUF --plan plan.json --out SMALL.GGUF --quiet").exit_code == 0
    assert run("verify SMALL.GGUF --against MODEL.GGUF --quiet").exit_code == 0
    assert "GGUF" in run("inspect SMALL.GGUF").stdout
