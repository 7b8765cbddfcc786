"""``moeprune calibrate`` in processes of its own: killed, gone on with, by several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moeprune.calibrate.reliability import split_half
from moeprune.calibrate.stats import Stats
from moeprune.cli import app, main
from tests.models import save_with_tokenizer

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TEXT = ("--data", "demo/python", "--data", "demo/german", "--tokens", 2000, "--length", 32, "--batch-size", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("calibrate") / "tiny-moe")


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    out = tmp_path_factory.mktemp("unbroken") / "stats.safetensors"
    printed("calibrate", model, "--out", out, *TEXT, "--quiet")
    return Stats.load(out)


def printed(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["moeprune", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    return capsys.readouterr().err


def start(model: Path, out: Path, *options: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """About 128 batches with sums saved after every one. Without a launcher it waits at the first for :func:`end`."""
    program = [*launcher, "-m", "moeprune"] if launcher else ["-m", "tests.cli.paused", f"{out}.go"]
    command = [*program, "calibrate", model, "--out", out, *TEXT, "--save-every", 0, *options]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def end(process: subprocess.Popen[str], out: Path, signum: signal.Signals = signal.SIGTERM) -> str:
    """Send a signal to a process that has saved its first sums, and return what it says then."""
    process.send_signal(signum)
    go = Path(f"{out}.go")
    go.touch()
    _, errors = process.communicate(timeout=100)
    go.unlink()
    return errors


def assert_same_bits(stats: Stats, other: Stats) -> None:
    arrays = dict(other.arrays())
    assert arrays.keys() == dict(stats.arrays()).keys()
    for name, array in stats.arrays():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on(model: Path, unbroken: Stats, tmp_path: Path, signum: signal.Signals) -> None:
    out, partial = tmp_path / "stats.safetensors", tmp_path / "stats.safetensors.partial"
    process = start(model, out)
    wait_for(partial / "rank-0-of-1.safetensors", process)
    errors = end(process, out, signum)
    assert not out.exists()
    if signum == signal.SIGTERM:
        assert process.returncode == 143
        assert f"stopped by SIGTERM. {partial} holds the sums of " in errors
    done = Stats.load(partial / "rank-0-of-1.safetensors").runs[0]["partial"]
    assert 0 < done["batches"] < done["of"]

    printed("calibrate", model, "--out", out, *TEXT, "--quiet")
    assert_same_bits(Stats.load(out), unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.safetensors"]


@pytest.mark.slow
def test_two_killed_ranks_go_on(model: Path, unbroken: Stats, tmp_path: Path) -> None:
    outs = [tmp_path / name / "stats.safetensors" for name in ("killed", "whole")]
    process = start(model, outs[0], launcher=tuple(TORCHRUN))
    for rank in (0, 1):
        wait_for(tmp_path / "killed" / "stats.safetensors.partial" / f"rank-{rank}-of-2.safetensors", process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode and not outs[0].exists()
    for out in outs:
        finished = start(model, out, "--json", launcher=tuple(TORCHRUN))
        said, errors = finished.communicate(timeout=200)
        assert finished.returncode == 0, errors
        assert json.loads(said)["tokens"] == 4000  # printed by one rank, once
        assert [path.name for path in out.parent.iterdir()] == ["stats.safetensors"]
    killed, whole = (Stats.load(out) for out in outs)
    assert_same_bits(killed, whole)
    np.testing.assert_array_equal(whole.experts["count"], unbroken.experts["count"])
    for name, array in whole.experts.items():
        np.testing.assert_allclose(array, unbroken.experts[name], rtol=1e-12, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--stream",), ("--until-stable", 0.8, "--stable-score", "frequency")], ids=["stream", "until-stable"]
)
def test_two_ranks_do_what_one_does(model: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    """Layer by layer, and with a decision on the way that all ranks must take alike."""
    outs = [tmp_path / "two.safetensors", tmp_path / "one.safetensors"]
    process = start(model, outs[0], *options, "--json", launcher=tuple(TORCHRUN))
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    printed("calibrate", model, "--out", outs[1], *TEXT, *options, "--quiet")
    two, one = (Stats.load(out) for out in outs)
    assert json.loads(said)["tokens"] == one.tokens.sum() > 0
    np.testing.assert_array_equal(two.experts["count"], one.experts["count"])
    for name, array in two.experts.items():
        np.testing.assert_allclose(array, one.experts[name], rtol=1e-12, err_msg=name)
    assert two.runs[0].get("stopped", {}).get("why") == one.runs[0].get("stopped", {}).get("why")


def test_other_options_start_afresh(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    process = start(model, out)
    wait_for(tmp_path / "stats.safetensors.partial" / "rank-0-of-1.safetensors", process)
    process.kill()
    process.communicate()
    result = CliRunner().invoke(app, ["calibrate", str(model), "--out", str(out), *map(str, TEXT), "--batch-size", "4"])
    assert (
        f"{tmp_path}/stats.safetensors.partial: sums of a run with other batch_size; starting afresh." in result.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


def test_a_dry_run_says_what_would_be_run_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    facts = json.loads(printed("calibrate", model, "--out", out, *TEXT, "--stats", "merge", "--dry-run", "--json"))
    assert facts["tokens"] == {"python": 2000, "german": 2000} and facts["pass"] == "whole model"
    said = printed("calibrate", model, "--out", out, *TEXT, "--stats", "merge", "--dry-run")
    assert "4,000 tokens, whole model: loading" in said and "statistics (merge): " in said
    assert not list(tmp_path.iterdir())
    printed("calibrate", model, "--out", out, *TEXT, "--stats", "merge", "--quiet")
    assert facts["bytes"] == pytest.approx(out.stat().st_size, rel=0.1)


def test_a_run_stops_when_its_score_is_stable(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    said = printed("calibrate", model, "--out", out, *TEXT, "--until-stable", "0.8", "--stable-score", "frequency")
    stats = Stats.load(out)
    stopped = stats.runs[0]["stopped"]
    assert stopped["why"] == "stable" and stopped["score"] == "frequency" and stopped["reliability"] >= 0.8
    assert 0 < stats.tokens.sum() < 4000
    assert np.ptp(stats.tokens) <= 200  # both domains have their share
    assert "Stopped: the reliability of frequency is" in said
    halves = split_half(stats, score="frequency")
    lowest = halves.whole.index(min(halves.whole))
    assert stopped["lowest"] == {"layer": halves.layers[lowest], "reliability": halves.whole[lowest]}
    assert f"({halves.whole[lowest]:.3f} in {halves.layers[lowest]}, the lowest)." in said


def test_text_that_ends_too_early_is_said(model: Path, tmp_path: Path) -> None:
    said = printed("calibrate", model, "--out", tmp_path / "stats", *TEXT, "--until-stable", "0.99999")
    assert "reap was not stable: its reliability is 0." in said
    assert Stats.load(tmp_path / "stats").runs[0]["stopped"]["why"] == "end of the text"


def test_layer_by_layer_gives_the_sums_of_a_whole_pass(model: Path, unbroken: Stats, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    printed("calibrate", model, "--out", out, *TEXT, "--stream", "--quiet")
    streamed = Stats.load(out)
    np.testing.assert_array_equal(streamed.tokens, unbroken.tokens)
    np.testing.assert_array_equal(streamed.experts["count"], unbroken.experts["count"])
    np.testing.assert_allclose(
        streamed.experts["gated_norm_sum"], unbroken.experts["gated_norm_sum"], rtol=1e-6, atol=1e-9
    )


def test_a_run_layer_by_layer_goes_on_from_the_last_finished_layer(model: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name / "stats.safetensors" for name in ("killed", "whole")]
    options = ("--stream", "--offload-hidden", tmp_path / "killed" / "hidden")
    process = start(model, outs[0], *options)
    wait_for(tmp_path / "killed" / "stats.safetensors.partial" / "rank-0-of-1.safetensors", process)
    end(process, outs[0])
    assert process.returncode == 143 and not outs[0].exists()
    printed("calibrate", model, "--out", outs[0], *TEXT, *options, "--quiet")
    printed("calibrate", model, "--out", outs[1], *TEXT, "--stream", "--quiet")
    assert_same_bits(*(Stats.load(out) for out in outs))
    assert sorted(path.name for path in outs[0].parent.iterdir()) == ["hidden", "stats.safetensors"]
    assert not list((tmp_path / "killed" / "hidden").iterdir())


def test_the_models_own_answers_are_calibration_text(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"The {n}th number is"}) + "\n" for n in range(4)))
    out = tmp_path / "stats.safetensors"
    command = ("calibrate", model, "--out", out, "--self-generate", prompts, "--max-new-tokens", 8, "--quiet")
    planned = json.loads(printed(*command, "--dry-run", "--json"))["answers"]
    assert list(tmp_path.iterdir()) == [prompts]
    printed(*command)
    answers = [json.loads(line) for line in (tmp_path / "stats.safetensors.answers.jsonl").read_text().splitlines()]
    stats = Stats.load(out)
    assert stats.domains == ("prompts",)
    assert stats.tokens.sum() >= sum(len(answer["input_ids"]) for answer in answers) > 0
    assert planned["prompts"]["prompts"] == len(answers) == 4
    assert planned["prompts"]["most_tokens"] >= sum(len(answer["input_ids"]) for answer in answers)


def test_text_and_prompts_of_one_name_are_refused_before_anything_is_answered(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "The number is"}\n')
    out = tmp_path / "stats.safetensors"
    said = refused(
        capsys, monkeypatch, model, "--out", out, "--data", text, "--self-generate", text, "--max-new-tokens", 8
    )
    assert "error: text and prompts are both named 'a'" in said
    assert not (tmp_path / "stats.safetensors.answers.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "error: no calibration text; give data"),
        ((*TEXT, "--stats", "merged"), "error: --stats: Input should be 'standard', 'merge' or 'full'"),
        ((*TEXT, "--stable-score", "raep"), "error: --stable-score: unknown score 'raep'. Did you mean 'reap'?"),
        ((*TEXT, "--until-stable", 1.5), "error: --until-stable: Input should be less than 1"),
        ((*TEXT, "--until-stable", 0.9, "--stable-score", "random"), "error: the score 'random' does not look at"),
        ((*TEXT, "--until-stable", 0.9, "--stream"), "error: --until-stable looks at the sums of all layers"),
        ((*TEXT, "--device-map", "auto"), "error: --device-map auto spreads a model over GPUs, but torch sees none."),
        ((*TEXT, "--device-map", "atuo"), "error: unknown device map 'atuo'. Did you mean 'auto'?"),
        ((*TEXT, "--device-map", "auto", "--stream"), "error: --device-map holds the whole model, --stream does not."),
        ((*TEXT, "--no-stream", "--offload-hidden", "x"), "error: --offload-hidden is for a run layer by layer."),
        ((*TEXT, "--keep-inputs", "x"), "error: --keep-inputs keeps the inputs of the sampled tokens."),
        ((*TEXT, "--stats", "full", "--keep-inputs", "/dev/null/x"), "error: /dev/null/x: a file of 0.00 GB for the"),
        ((*TEXT, "--out", "/dev/null/x"), "error: /dev/null/x: cannot be written there ("),
        ((*TEXT, "--out", ".", "--force"), "error: .: is a folder. Give the name of a file."),
        ((*TEXT, "--stream", "--offload-hidden", "/dev/null/x"), "error: /dev/null/x/rank-0-of-1: no folder"),
        ((*TEXT, "--length", 1024), "error: rows of 1024 tokens are longer than the model's context of 512."),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, options: tuple[object, ...], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, monkeypatch, model, "--out", "stats", "--quiet", *options).startswith(message)
    assert not list(tmp_path.iterdir())
