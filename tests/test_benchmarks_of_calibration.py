"""The benchmarks of calibration run, and what they say of tools and devices follows from what these answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import SMALLEST, TINY, differences, measure
from benchmarks.models import make_qwen3_moe
from benchmarks.peers.environments import Unavailable, clone_reap, make_environment
from benchmarks.peers.measure import OURS, PLAIN, TOOLS, _agreement, _measured, _time_of
from benchmarks.peers.summary import summarise
from benchmarks.peers.tools import REPOSITORY, Workplace, ask
from benchmarks.ratios import in_turn, ratios
from moeprune.anatomy.derive import derive_anatomy
from moeprune.calibrate.stats import Stats

CEREBRAS = TOOLS[-1]


def answer(cpu: float, **more: object) -> dict:
    return {"cpu_seconds": cpu, "wall_seconds": 2 * cpu, "peak_mib": 100.0, "work_mib": 7.0, "versions": {}, **more}


def test_ratios_are_those_of_the_same_round():
    found = ratios({"plain": [1.0, 2.0, 4.0], "other": [2.0, 6.0, 4.0]}, over="plain")
    assert found["other"] == {"median_ratio": 2.0, "ratios": [1.0, 2.0, 3.0]}
    assert found["seconds"] == {"plain": 2.0, "other": 4.0}


def test_works_are_done_forwards_and_backwards_after_a_round_that_does_not_count():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "ab"}
    in_turn(works, rounds=2, clock=lambda work: float(bool(work())))
    assert done == ["a", "b", "a", "b", "b", "a"]


def test_tools_are_compared_with_the_plain_pass_of_their_round():
    answers = {(PLAIN, "float32"): [answer(1.0), answer(2.0)], (OURS, "float32"): [answer(1.5), answer(2.0)]}
    found = _time_of((OURS, "float32"), answers)
    assert found["times_plain"] == {"median": 1.25, "least": 1.0, "most": 1.5}
    assert found["times_moeprune"]["median"] == 1.0


def test_agreement_counts_the_experts_that_both_keep():
    ours = answer(1.0, kept=[[0, 1, 2, 3]], saliency=[[1.0, 2.0, 4.0]])
    theirs = answer(1.0, kept=[[1, 2, 3, 4]], saliency=[[1.0, 2.0, 5.0]])
    (found,) = _agreement("random", {OURS: ours, CEREBRAS: theirs})
    assert found["common"] == [3]
    assert found["jaccard"] == [0.6]
    assert found["largest_relative_difference_of_scores"] == pytest.approx(0.2)
    assert "3 of 4" in summarise([found])


def test_all_tools_are_timed_in_turn_and_compared_on_both_models(tmp_path, monkeypatch):
    asked = []

    def canned(python: Path, program: str, **request: object) -> dict:
        asked.append((request.get("what"), Path(str(request.get("model"))).name, request.get("dtype")))
        if program == "inputs.py":
            return {"tokens": request["tokens"]}
        if program == "causality.py":
            return {"scale": 1.0, "difference": {"rows": {"basic": 0.0, "sequential": 2.5}}}
        kept = [[0, 2]] if "sequential" in str(request["what"]) else [[0, 1]]
        return answer(1.0, kept=kept, load=[[0.5, 2.0]])

    monkeypatch.setattr("benchmarks.peers.measure.ask", canned)
    place = Workplace({owner: Path("python") for owner in ("moeprune", "llm-compressor", "Cerebras")}, tmp_path, {})
    found = list(_measured(place, tmp_path, rounds=2, tokens=64))
    timed = [what for what in asked if what[1:] == ("random", "float32")]
    assert timed[:7] == timed[7:14][::-1], "forwards, then backwards"
    compared = {(line["model"], line["tool"]): line["common"] for line in found if "common" in line}
    assert len(compared) == 2 * 7
    assert compared["trained", "llm-compressor, basic"] == [2]
    assert compared["trained", "llm-compressor, sequential, causal"] == [1]
    table = summarise(found)
    assert table.count("| bfloat16 |") == 4
    assert "sequential: 2.5" in table


def test_a_process_is_asked_with_json_and_times_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.tools.PROGRAMS", tmp_path)
    (tmp_path / "clock.py").symlink_to(REPOSITORY / "benchmarks" / "peers" / "programs" / "clock.py")
    (tmp_path / "work.py").write_text(
        "from clock import answer, request, timed\n"
        "size, spent = timed(lambda: len(b'x' * (request()['mib'] << 20)))\n"
        "print('noise'); answer(size=size, **spent)\n"
    )
    found = ask(sys.executable, "work.py", mib=64)
    assert found["size"] == 64 << 20
    assert found["peak_mib"] >= found["work_mib"] >= 60
    assert found["cpu_seconds"] <= found["wall_seconds"] + 0.1
    with pytest.raises(RuntimeError, match="KeyError: 'mib'"):
        ask(sys.executable, "work.py")


def test_what_cannot_be_installed_is_said(tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match="git clone"):
        clone_reap(tmp_path / "reap", source=str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable, match="pip install"):
        make_environment(tmp_path / "environment", packages=("no-such-package",))
    assert not (tmp_path / "environment" / "complete.txt").exists()


def test_all_of_the_benchmark_of_an_accelerator_runs():
    lines = list(measure(SMALLEST, device="cpu", rounds=1, folder=None, profile=False))
    json.dumps(lines)
    assert [line["within_tolerance"] for line in lines if "within_tolerance" in line] == [True, True]
    timed = next(line for line in lines if "model_mib" in line)
    assert timed["merge"]["median_ratio"] > 0


def test_sums_that_differ_are_seen():
    facts = derive_anatomy(make_qwen3_moe(TINY, dtype="float32").config).facts(name="m", fingerprint="-")
    one, other = Stats.zeros(facts, domains=["text"]), Stats.zeros(facts, domains=["text"])
    for stats in (one, other):
        stats.experts["count"] += 1000
    assert differences(one, other)["within_tolerance"]
    other.experts["count"][0, 2, 5] += 2
    found = differences(one, other)
    assert not found["within_tolerance"]
    assert found["largest_relative_difference"]["experts.count"] == pytest.approx(np.float64(2e-3))
