"""The stages of a run. Each is a name, the fingerprint of its inputs, its files, and the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moeprune.calibrate.stats import Stats
from moeprune.evaluate import ModelResult, compare, evaluate_model
from moeprune.export.export import export_checkpoint
from moeprune.export.verify import verify_checkpoint
from moeprune.files import sha256_file, write_json
from moeprune.plan.uniform import make_plan
from moeprune.recipe import ORIGINAL
from moeprune.run.state import fingerprint
from moeprune.run.workspace import Workspace, folder_hashes, task_folder


@dataclass(frozen=True)
class Stage:
    """A unit of work that is skipped when its inputs have not changed.

    Attributes:
        name: For run.json and messages.
        fingerprint: Hash of everything it depends on; computed only after the stages before it have run.
        outputs: The files that it makes.
        work: Makes them.
        after: The stages whose files it depends on, by name.
    """

    name: str
    fingerprint: Callable[[], str]
    outputs: tuple[Path, ...]
    work: Callable[[], object]
    after: tuple[str, ...] = ()


def stages(space: Workspace) -> Iterator[Stage]:
    """All stages of the recipe, in order."""
    yield _calibrate(space)
    for settings in space.plans:
        yield _plan(space, settings.name)
    if space.recipe.evaluate is not None:
        for name in (ORIGINAL, *(settings.name for settings in space.plans)):
            yield _evaluate(space, name)
        yield _compare(space)
    if space.recipe.throughput is not None:
        yield _throughput(space)
    if space.recipe.exported is not None:
        yield _export(space, space.recipe.exported)
        yield _verify(space)
        yield _observe_pruned(space, space.recipe.exported)


def _calibrate(space: Workspace) -> Stage:
    def inputs() -> str:
        specs = [*space.data, *space.recipe.calibrate.self_generate]
        return fingerprint(
            model=space.source.facts.fingerprint,
            calibrate=space.recipe.calibrate.model_dump(mode="json", exclude={"data", "self_generate"}),
            data=[spec.model_dump(mode="json", exclude={"source"} if spec.local_format else None) for spec in specs],
            files=[sha256_file(path) for spec in specs for path in spec.local_files],
            dtype=space.recipe.dtype,
        )

    return Stage("calibrate", inputs, (space.stats_path,), lambda: space.job.run())


def _plan(space: Workspace, name: str) -> Stage:
    settings = next(item for item in space.plans if item.name == name)
    path = space.plan_path(name)
    where = space.recipe.where

    def work() -> None:
        stats = Stats.load(space.stats_path)
        plan = make_plan(stats, **settings.arguments, where=where, stats_sha256=sha256_file(space.stats_path))
        plan.save(path)

    return Stage(
        f"plan {name}",
        lambda: fingerprint(
            stats=sha256_file(space.stats_path),
            settings=settings.model_dump(mode="json"),
            where=list(map(asdict, where)),
        ),
        (path,),
        work,
        after=("calibrate",),
    )


def _evaluate(space: Workspace, name: str) -> Stage:
    settings = space.recipe.evaluate
    assert settings is not None
    folder = task_folder(settings)

    def inputs() -> str:
        return fingerprint(
            model=space.source.facts.fingerprint,
            plan=None if name == ORIGINAL else space.plan(name).sha256,
            evaluate=settings.model_dump(mode="json", exclude={"include"}),
            tasks=folder_hashes(folder),
            dtype=space.recipe.dtype,
        )

    def work() -> None:
        evaluate_model(
            space.model if name == ORIGINAL else space.pruned(name),
            tokenizer=space.tokenizer, tasks=settings.tasks, include_path=folder, limit=settings.limit,
            batch_size=settings.batch_size, seed=settings.seed, name=name, quiet=space.quiet,
        ).save(space.eval_path(name))  # fmt: skip

    after = () if name == ORIGINAL else (f"plan {name}",)
    return Stage(f"evaluate {name}", inputs, (space.eval_path(name),), work, after=after)


def _compare(space: Workspace) -> Stage:
    names = [ORIGINAL, *(settings.name for settings in space.plans)]
    path = space.out / "eval.json"

    def work() -> None:
        results = {name: ModelResult.load(space.eval_path(name)) for name in names}
        models = {name: result.summary() | {"seconds": result.seconds} for name, result in results.items()}
        write_json(path, {"baseline": ORIGINAL, "models": models, "paired": compare(results, baseline=ORIGINAL)})

    return Stage(
        "compare",
        lambda: fingerprint(results=[sha256_file(space.eval_path(n)) for n in names]),
        (path,),
        work,
        after=tuple(f"evaluate {name}" for name in names),
    )


def _throughput(space: Workspace) -> Stage:
    settings = space.recipe.throughput
    assert settings is not None
    path = space.out / "throughput.json"
    names = [variant.name for variant in space.plans]

    def inputs() -> str:
        return fingerprint(
            model=space.source.facts.fingerprint, plans=[space.plan(name).sha256 for name in names],
            throughput=settings.model_dump(mode="json"), dtype=space.recipe.dtype, device=space.device,
        )  # fmt: skip

    def work() -> None:
        from moeprune.serve.plain import measure_throughput

        models = {ORIGINAL: space.model, **{name: space.pruned(name) for name in names}}
        write_json(path, measure_throughput(models, **settings.model_dump(), seed=0, progress=not space.quiet))

    return Stage("throughput", inputs, (path,), work, after=tuple(f"plan {name}" for name in names))


def _export(space: Workspace, name: str) -> Stage:
    folder = space.out / "checkpoint"

    def work() -> None:
        plan = space.plan(name)
        title = f"{Path(space.recipe.model).name}-{name}"
        export_checkpoint(space.recipe.model, plan=plan, out=folder, name=title, force=True, quiet=space.quiet)
        plan.save(space.out / "plan.json")

    return Stage(
        "export",
        lambda: fingerprint(model=space.source.facts.fingerprint, plan=space.plan(name).sha256),
        (folder / "config.json", space.out / "plan.json"),
        work,
        after=(f"plan {name}",),
    )


def _verify(space: Workspace) -> Stage:
    path = space.out / "verify.json"
    folder = space.out / "checkpoint"

    def work() -> None:
        from moeprune.errors import VerifyError

        checks = verify_checkpoint(folder, against=space.recipe.model, device=space.device, quiet=space.quiet)
        failed = [check for check in checks if not check.passed]
        if failed:
            raise VerifyError(f"{folder}: {failed[0].name}: {failed[0].detail}")
        write_json(path, [check.to_json() for check in checks])

    return Stage(
        "verify",
        lambda: fingerprint(files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
                            manifest=sha256_file(folder / "moeprune.json")),
        (path,),
        work,
        after=("export",),
    )  # fmt: skip


def _observe_pruned(space: Workspace, name: str) -> Stage:
    """Router load of the exported variant on the same text, for the report's before and after."""
    path = space.out / "after.safetensors"

    def work() -> None:
        from moeprune.anatomy.source import open_source
        from moeprune.calibrate.calibrate import calibrate

        calibrate(
            open_source(space.out / "checkpoint"), model=space.pruned(name), rows=space.rows,
            batch_size=space.recipe.calibrate.batch_size, seed=space.recipe.calibrate.seed, quiet=space.quiet,
        ).save(path)  # fmt: skip

    return Stage(
        "observe pruned",
        lambda: fingerprint(stats=sha256_file(space.stats_path), plan=space.plan(name).sha256),
        (path,),
        work,
        after=("calibrate", f"plan {name}", "export"),
    )
