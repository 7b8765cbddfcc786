"""Everything that can be known to be wrong before the first stage runs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from moeprune.calibrate.data import check_domains
from moeprune.errors import MissingDependencyError, PlanError, RecipeError, did_you_mean
from moeprune.evaluate import check_tasks
from moeprune.files import why_not_writable
from moeprune.plan.uniform import Sizes, choose_sizes
from moeprune.run.state import STATE
from moeprune.run.workspace import Workspace, task_folder


def check_run(space: Workspace, *, force: bool) -> dict[str, Sizes]:
    """Refuse a run that cannot succeed.

    Returns:
        What each variant makes of the model, by name.

    Raises:
        RecipeError: If the folder is in use for something else.
        PlanError: If a variant is impossible for the model.
        DataError, EvaluationError, MissingDependencyError: If text, tasks or packages are missing.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError(
            "a recipe runs in one process. Of its stages only calibration can be shared: torchrun ... -m moeprune "
            "calibrate."
        )
    check_folder(space.out, force=force)
    space.source.check_runs()
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the report needs matplotlib. Install it with: pip install 'moeprune[report]'")
    if space.recipe.evaluate is not None:
        check_tasks(space.recipe.evaluate.tasks, include_path=task_folder(space.recipe.evaluate))
    prompts = space.recipe.calibrate.self_generate
    if space.data or not prompts:
        check_domains(space.data)
    facts = space.source.facts
    domains = [spec.name for spec in space.data]
    sizes = {}
    for variant in space.plans:
        try:
            sizes[variant.name] = choose_sizes(facts, **variant.sizes, where=space.recipe.where)
        except PlanError as error:
            raise PlanError(f"variant {variant.name!r}: {error}") from error
        for domain in variant.domains or {}:
            if domain not in domains and not prompts:  # the rows of prompts name domains, too
                raise PlanError(f"variant {variant.name!r}: unknown domain {domain!r}. {did_you_mean(domain, domains)}")
    return sizes


def check_folder(out: Path, *, force: bool) -> None:
    """Refuse a folder that holds something other than a run.

    Raises:
        RecipeError: What is there and what to do.
    """
    if out.is_file():
        raise RecipeError(f"{out}: a file. Give a folder for the run.")
    if out.is_dir() and any(out.iterdir()) and not (out / STATE).is_file():
        what = "--force replaces only run folders; choose another folder" if force else "Choose another folder"
        raise RecipeError(f"{out}: not empty and not a run of moeprune (no {STATE}). {what}.")
    if why := why_not_writable(out / STATE):
        raise RecipeError(f"{out}: cannot be written there ({why}). Choose another folder.")
