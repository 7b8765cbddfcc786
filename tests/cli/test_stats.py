"""``moeprune stats``: what it prints for people and for programs."""

from __future__ import annotations

import json

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from moeprune.cli import app
from tests.calibrate.reference import random_rows
from tests.calibrate.reference_more import observe_all
from tests.fake_stats import fake_stats
from tests.models import build


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    observe_all(build("qwen3_moe"), random_rows("code", rows=6), random_rows("math", rows=3, seed=1)).save(path)
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["stats", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_says_what_was_seen_and_how_well_it_repeats(file):
    shown = run("show", file)
    assert "tiny: 99 tokens" in shown
    for text in ("code", "model.layers.2", "warning: ", "rank correlation", "enough text?", "easy-ep"):
        assert text in shown


def test_show_as_json_is_complete(file):
    facts = json.loads(run("show", file, "--json"))
    assert facts["domains"] == {"code": 66, "math": 33}
    assert [layer["layer"] for layer in facts["layers"]] == ["model.layers.0", "model.layers.2"]
    assert facts["absent"] == [] and facts["unseen_layers"] == []
    assert {half["score"] for half in facts["reliability"]} >= {"reap", "frequency"}
    (pair,) = facts["agreement"]
    assert pair["domains"] == ["code", "math"] and 0 <= pair["overlap"] <= 1
    assert all(expert["layer"].startswith("model.layers.") for expert in facts["super_experts"])


def test_experts_without_a_token_and_layers_without_one_are_warned_of(tmp_path):
    stats = fake_stats()
    for array in stats.experts.values():
        array[:, 1] = 0
    stats.save(tmp_path / "stats")
    shown = run("show", tmp_path / "stats")
    assert "warning: no token was routed in model.layers.2." in shown
    assert "warning: never chosen: model.layers.1 9." in shown


def test_a_picture_of_the_coverage(file, tmp_path):
    run("show", file, "--plot", tmp_path / "coverage.png")
    picture = imread(tmp_path / "coverage.png")
    assert picture.shape[1] == 1620 and picture[..., :3].std() > 0.05


def test_the_same_statistics_give_the_same_picture(file, tmp_path):
    for name in ("a.png", "b.png"):
        run("show", file, "--plot", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_diff_of_a_file_with_itself_and_with_another(file, tmp_path):
    assert "both keep 100.0% of 5 experts a layer" in run("diff", file, file)
    observe_all(build("qwen3_moe"), random_rows("code", rows=4, seed=9)).save(tmp_path / "other")
    facts = json.loads(run("diff", file, tmp_path / "other", "--json", "--score", "frequency", "--keep", "0.3"))
    assert facts["keep"] == 3 and facts["tokens"] == [99, 44]
    for layer in facts["layers"]:
        assert len(layer["only_first"]) == len(layer["only_second"]) == round(3 * (1 - layer["overlap"]))
