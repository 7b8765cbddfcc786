"""Run a recipe: every stage in order, those whose inputs are unchanged skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeprune.files import write_text
from moeprune.plan.uniform import Sizes
from moeprune.recipe import Recipe, dump_recipe
from moeprune.run.facts import collect_facts
from moeprune.run.preflight import check_run
from moeprune.run.stages import Stage, stages
from moeprune.run.state import RunState, fingerprint
from moeprune.run.workspace import Workspace

Say = Callable[[str], object]


def run_recipe(
    recipe: Recipe,
    *,
    out: Path,
    command: str,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
    say: Say = print,
) -> dict:
    """Bring the run folder up to date with the recipe.

    Args:
        recipe: What to do.
        out: The run folder; a killed or changed run there is continued.
        command: The command line, for the report.
        device: Where the model runs.
        force: Start over, dropping what the folder holds.
        quiet: No progress bars and no remarks.
        say: Receives one line a stage.

    Returns:
        The facts of the report (``report.json``).

    Raises:
        MoePruneError: Whatever a stage refuses; nothing runs before all that can be checked has been.
    """
    from moeprune.report import write_report

    space = Workspace(recipe, out, device=device, quiet=quiet)
    check_run(space, force=force)
    if force and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    state = RunState(out)
    state.data["command"] = command
    state.save()
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    for stage in stages(space):
        _bring_up_to_date(stage, state, say)
    facts = collect_facts(space, state)
    report = Stage(
        "report",
        lambda: fingerprint(facts=facts),
        tuple(out / f"report.{kind}" for kind in ("html", "md", "json")),
        lambda: write_report(facts, out_dir=out),
    )
    _bring_up_to_date(report, state, say)
    return facts


@dataclass(frozen=True)
class Preview:
    """What :func:`run_recipe` would do.

    Attributes:
        stages: Every stage by name: whether it is still to be done.
        sizes: What each variant makes of the model.
    """

    stages: dict[str, bool]
    sizes: dict[str, Sizes]


def preview(recipe: Recipe, *, out: Path, device: str = "auto", force: bool = False) -> Preview:
    """Look ahead, after the same checks as :func:`run_recipe`. Writes nothing."""
    space = Workspace(recipe, out, device=device)
    sizes = check_run(space, force=force)
    state = RunState(out)
    due: dict[str, bool] = {}
    for stage in stages(space):
        # What depends on a stage that is still to be done depends on files that are not there yet, or will change.
        waits = force or any(due[name] for name in stage.after)
        due[stage.name] = waits or not state.is_done(stage.name, stage.fingerprint(), stage.outputs)
    return Preview({**due, "report": any(due.values())}, sizes)


def _bring_up_to_date(stage: Stage, state: RunState, say: Say) -> None:
    inputs = stage.fingerprint()
    if state.is_done(stage.name, inputs, stage.outputs):
        say(f"{stage.name}: up to date")
        return
    state.forget(stage.name)
    begun = time.perf_counter()
    stage.work()
    seconds = time.perf_counter() - begun
    state.record(stage.name, inputs, seconds)
    say(f"{stage.name}: {seconds:.1f} s")
