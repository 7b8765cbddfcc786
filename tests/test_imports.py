"""Planning and `--help` are instant: they load none of the heavy packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "matplotlib"}


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after ``code``."""
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", report + code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return HEAVY & set(line.split())


def test_the_check_itself_sees_a_heavy_import():
    assert loaded_after("sys.modules['torch'] = sys") == {"torch"}


@pytest.mark.parametrize(
    "modules",
    [
        "moeprune",
        "moeprune.recipe, moeprune.plan.plan, moeprune.plan.uniform, moeprune.score, moeprune.calibrate.stats",
        "moeprune.cli, moeprune.resources, moeprune.data_spec",
    ],
)
def test_light_modules_load_nothing_heavy(modules):
    assert loaded_after(f"import {modules}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["ls", "scores"], ["ls", "recipes"]])
def test_the_program_loads_nothing_heavy_before_a_command_needs_it(arguments):
    run = f"import runpy; sys.argv = ['moeprune', *{arguments}]; runpy.run_module('moeprune', run_name='__main__')"
    assert loaded_after(run) == set()


def test_making_a_plan_loads_nothing_heavy(tmp_path):
    code = f"""
from pathlib import Path
from moeprune.plan.plan import Plan
from moeprune.plan.uniform import make_plan
from moeprune.calibrate.stats import Stats
from tests.fake_stats import fake_stats
path = Path({str(tmp_path)!r})
fake_stats().save(path / "stats")
make_plan(Stats.load(path / "stats"), score="reap", keep=0.5).save(path / "plan.json")
Plan.load(path / "plan.json")
"""
    assert loaded_after(code) == set()
