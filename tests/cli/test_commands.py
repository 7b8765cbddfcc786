"""The program as a user meets it: every command, its help, its JSON, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeprune import __version__
from moeprune.cli import app, main
from tests.fake_stats import fake_stats
from tests.models import save_with_tokenizer

COMMANDS = [
    "run", "inspect", "calibrate", "stats merge", "stats show", "stats diff", "plan", "check", "export", "verify",
    "eval", "ls",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("cli") / "tiny-moe")


def moeprune(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the program prints to stderr when it refuses; it must exit with 1 and show no traceback."""
    monkeypatch.setattr(sys, "argv", ["moeprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    text = moeprune(*command.split(), "--help")
    assert "Example: moeprune" in text


def test_the_commands_one_after_another(model: Path, tmp_path: Path) -> None:
    stats, other, both = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "ab"))
    options = ("--tokens", 300, "--length", 64, "--quiet")
    facts = json.loads(moeprune("calibrate", model, "--data", "code=demo/python", "--out", stats, *options, "--json"))
    assert facts["tokens"] == 300 and facts["domains"] == {"code": 300}
    moeprune("calibrate", model, "--data", "demo/german", "--out", other, *options)
    moeprune("stats", "merge", stats, other, "--out", both)
    shown = json.loads(moeprune("stats", "show", both, "--json"))
    assert shown["domains"] == {"code": 300, "german": 300}

    plan = tmp_path / "plan.json"
    printed = moeprune("plan", both, "--keep", 0.5, "--top-k", 2, "--domain", "code=0.7,german=0.3", "--out", plan)
    assert f"{plan}: 5 of 10 experts in 2 layers, top-2 of 3" in printed

    out = tmp_path / "pruned"
    dry = json.loads(moeprune("export", model, "--plan", plan, "--out", out, "--dry-run", "--json"))
    assert not out.exists() and dry["tensors_dropped"] == 30
    moeprune("export", model, "--plan", plan, "--out", out, "--quiet")
    checks = json.loads(moeprune("verify", out, "--against", model, "--plan", plan, "--quiet", "--json"))
    assert [check["passed"] for check in checks] == [True] * len(checks)
    assert "logits equal to the plan applied in memory" in {check["name"] for check in checks}

    scores = json.loads(
        moeprune(
            "eval", model, out, "--plan", plan, "--tasks", "offline_choice_python", "--limit", 3, "--quiet", "--json",
            "--out", tmp_path / "scores.json",
        )
    )  # fmt: skip
    assert scores["baseline"] == str(model)
    assert scores["models"][str(out)]["results"] == scores["models"][str(plan)]["results"]
    assert json.loads((tmp_path / "scores.json").read_text()) == scores


def test_verify_exits_with_1_and_the_reason(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, plan, out = tmp_path / "s.safetensors", tmp_path / "plan.json", tmp_path / "pruned"
    moeprune("calibrate", model, "--data", "demo/python", "--out", stats, "--tokens", 200, "--length", 50, "--quiet")
    moeprune("plan", stats, "--keep", 0.5, "--out", plan, "--quiet")
    moeprune("export", model, "--plan", plan, "--out", out, "--quiet")
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    error = failure(capsys, monkeypatch, "verify", out, "--quiet")
    assert error.startswith(f"error: {out}: every tensor byte for byte: ")
    assert error.endswith("of the source\n")


def test_nothing_is_overwritten_without_force(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_text("precious")
    error = failure(capsys, monkeypatch, "calibrate", model, "--data", "demo", "--out", taken)
    assert error == f"error: {taken}: exists. Choose another name, or replace it with --force.\n"
    assert taken.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ls", "score"],
            "cannot list 'score'. Did you mean 'scores'? "
            "Known: data, engines, families, formats, keys, recipes, scores, tasks.",
        ),
        (
            ["run", "quikstart", "--out", "x"],
            "quikstart: no such recipe. `moeprune ls recipes` lists those that ship with moeprune.",
        ),
        (
            ["plan", "none.safetensors", "--out", "p.json"],
            "none.safetensors: no such statistics file. "
            "`moeprune calibrate MODEL --data ... --out none.safetensors` makes it.",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert failure(capsys, monkeypatch, *arguments) == f"error: {message}\n"


def test_a_command_does_not_replace_what_it_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`plan stats --out stats --force` once left a plan where hours of calibration had been."""
    stats, link = tmp_path / "stats", tmp_path / "link"
    fake_stats().save(stats)
    link.symlink_to(stats)
    before = stats.read_bytes()
    for arguments in (["plan", stats, "--out", link], ["stats", "merge", stats, "--out", stats]):
        error = failure(capsys, monkeypatch, *arguments, "--force")
        assert error == f"error: {arguments[-1]}: is what this command reads. Choose another name.\n"
    assert stats.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [["plan", "stats", "--out"], ["stats", "merge", "stats", "--out"], ["eval", "demo", "--tasks", "nope", "--out"],
     ["stats", "show", "stats", "--plot"], ["run", "quickstart", "--dry-run", "--out"]],
    ids=" ".join,
)  # fmt: skip
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    fake_stats().save(Path("stats"))
    error = failure(capsys, monkeypatch, *arguments, "file/x.png")
    assert error.startswith("error: file/x.png: cannot be written there (Not a directory). Choose another ")


def test_shares_of_domains_are_not_given_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_stats().save(tmp_path / "stats")
    arguments = ["plan", tmp_path / "stats", "--out", tmp_path / "plan", "--domain", "code=1,math=1,code=2"]
    assert failure(capsys, monkeypatch, *arguments) == "error: --domain code=1,math=1,code=2: code is given twice.\n"
    assert not (tmp_path / "plan").exists()


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"moeprune {__version__}\n"


def test_ls_lists_what_ships() -> None:
    assert {row["name"] for row in json.loads(moeprune("ls", "scores", "--json"))} >= {"random", "frequency", "reap"}
    assert "quickstart" in moeprune("ls", "recipes")
    assert "offline_choice" in moeprune("ls", "tasks")
    assert "demo/python" in moeprune("ls", "data")


def test_inspect_prints_parts_and_what_pruning_leaves(model: Path) -> None:
    text = moeprune("inspect", model)
    assert "10 a layer, top-3" in text and "softmax over the top-k" in text
    facts = json.loads(moeprune("inspect", model, "--json"))
    assert facts["parameters"]["total"] == sum(facts["parameters"]["by_part"].values())
    assert [row["num_experts"] for row in facts["pruned"]] == [8, 5]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from moeprune.cli import main; sys.argv = ['moeprune', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "False False"
