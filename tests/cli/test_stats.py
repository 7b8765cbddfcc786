"""``moeprune stats``: what it prints for people and for programs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from moeprune.calibrate.stats import Stats
from moeprune.cli import app
from moeprune.errors import MoePruneError
from tests.calibrate.reference import random_rows
from tests.calibrate.reference_more import observe_all
from tests.fake_stats import facts, fake_stats
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
    assert "warning: no token was routed in model.layers.2: nothing tells their experts apart. Calibrate on" in shown
    assert "warning: never chosen: model.layers.1 9. They are pruned first; if they serve text of another" in shown


def test_tokens_an_expert_are_told_by_domain_however_many_there_are(tmp_path):
    stats = fake_stats(domains=[f"domain-{number}" for number in range(12)])
    stats.experts["count"][3, 0, :2] = [31, 0]
    stats.save(tmp_path / "stats")
    shown = run("show", tmp_path / "stats")
    counts = stats.experts["count"][3]
    spread = f"0 / {np.median(counts):,.0f} / {counts.max():,.0f}"
    assert re.search(rf"  domain-3 +16,000 +{re.escape(spread)} +1 +3\n", shown)
    assert max(len(line) for line in shown.splitlines() if not line.startswith("warning")) <= 120


def test_show_says_how_the_statistics_were_made_and_what_they_lack(tmp_path):
    stats = fake_stats()
    del stats.experts["max_abs"]
    stopped = {"why": "stable", "score": "reap", "reliability": 0.98765, "wanted": 0.98}
    stats.runs = [{"dtype": "bfloat16", "device": "cpu", "length": 256, "seed": 3, "moeprune": "9"}, {}]
    stats.runs.append({"stopped": stopped})
    stats.save(tmp_path / "stats")
    shown = run("show", tmp_path / "stats")
    assert "tiny: 12,000 tokens, standard statistics" in shown
    assert "  run: bfloat16 on cpu, rows of 256, seed 3, moeprune 9\n  run: nothing is recorded of it\n" in shown
    assert "  run: ended: stable, reap 0.988 of 0.98 wanted\n" in shown
    assert "  without max_abs, which calibration does not give for qwen3_moe.\n" in shown
    assert "enough text? These statistics do not tell even from odd rows, which would say it. Calibrate again." in shown


def test_statistics_of_no_text_are_described(tmp_path):
    Stats.zeros(facts(), domains=["code"], halves=True).save(tmp_path / "stats")
    shown = run("show", tmp_path / "stats")
    assert "warning: no text was run of code." in shown
    assert re.search(r"  reap +- +-\n", shown)


def test_what_a_score_cannot_tell_is_said(tmp_path):
    observe_all(build("qwen3_moe"), random_rows("code", rows=2), statistics="merge").save(tmp_path / "stats")
    shown = run("show", tmp_path / "stats", "--score", "mone")
    assert "domains are not compared: these statistics do not tell mone by domain." in shown
    assert "not known of mone: not all that it needs is kept by halves." in shown


def refused(*arguments):
    result = CliRunner().invoke(app, ["stats", *map(str, arguments)])
    assert isinstance(result.exception, MoePruneError)
    return str(result.exception)


def test_a_picture_does_not_take_the_place_of_the_statistics(file, tmp_path):
    """`--plot` once wrote a PNG over whatever file was named."""
    before = file.read_bytes()
    assert refused("show", file, "--plot", file) == f"--plot {file}: expected a name that ends in .png."
    picture = tmp_path / "coverage.png"
    picture.write_text("mine")
    assert "exists" in refused("show", file, "--plot", picture)
    assert picture.read_text() == "mine" and file.read_bytes() == before
    run("show", file, "--plot", picture, "--force")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_merged_with_a_copy_of_itself(tmp_path):
    stats = fake_stats()
    stats.runs = [{"text": {"code": "aa", "math": "bb"}}]
    for name in ("a", "b"):
        stats.save(tmp_path / name)
    said = refused("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert "merged, it would count twice" in said and not (tmp_path / "both").exists()


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
