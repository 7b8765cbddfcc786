"""``moeprune calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moeprune.cli import calibrate_options as options
from moeprune.cli.options import Device, Dtype, Force, Json, ModelArgument, Quiet, Seed, print_json, refuse_existing
from moeprune.format import size

if TYPE_CHECKING:
    from moeprune.recipe import Calibration

_OPTIONS = {"packing": "pack", "statistics": "stats"}


def calibrate(
    model: ModelArgument,
    out: options.Out,
    data: options.Data = None,
    column: options.Column = None,
    tokens: options.Tokens = 65_536,
    length: options.Length = None,
    pack: options.Pack = "auto",
    no_cache: options.NoCache = False,
    self_generate: options.SelfGenerate = None,
    max_new_tokens: options.MaxNewTokens = 1024,
    level: options.Level = "standard",
    keep_inputs: options.KeepInputs = None,
    until_stable: options.UntilStable = None,
    stable_score: options.StableScore = "reap",
    batch_size: options.BatchSize = 8,
    device_map: options.DeviceMap = None,
    stream: options.Stream = None,
    offload_hidden: options.OffloadHidden = None,
    save_every: options.SaveEvery = 10,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    dry_run: options.DryRun = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run text through a model and record what its routers and experts do.

    One calibration serves every score, ratio and top-k. Domains are kept apart, so that plans can weigh them. Several
    processes share the text: `torchrun --nproc-per-node 8 -m moeprune calibrate ...`. The command of a run that was
    stopped, given again, goes on with it.

    Example: `moeprune calibrate demo --data demo --out stats.safetensors`
    """
    refuse_existing(out, force=force or dry_run)
    from moeprune.anatomy.source import open_source
    from moeprune.calibrate.job import How, Job
    from moeprune.calibrate.ranks import Ranks
    from moeprune.cli.stats import describe
    from moeprune.data_spec import parse_data_spec

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    how = How(dtype, device_map, stream, offload_hidden, keep_inputs, save_every, quiet, not no_cache)
    ranks = Ranks.current(device)
    with ranks.together():
        source = open_source(model)
        settings = _settings(
            data=[parse_data_spec(one, column=column) for one in data or []],
            self_generate=[parse_data_spec(one, column=column) for one in self_generate or []],
            max_new_tokens=max_new_tokens, tokens=tokens, length=length or min(2048, source.anatomy.context or 2048),
            batch_size=batch_size, seed=seed, packing=pack, statistics=level, until_stable=until_stable,
            stable_score=stable_score,
        )  # fmt: skip
        job = Job(source, out=out, settings=settings, how=how, ranks=ranks, say=say)
        if dry_run:
            facts = job.describe()
        else:
            stats = job.run()
            facts = {**describe(stats), "run": stats.runs[0]}
    if ranks.is_first and as_json:
        print_json(facts)
    elif ranks.is_first and (dry_run or not quiet):
        typer.echo(_plan_text(facts) if dry_run else _result_text(facts, out))


def _settings(**values: Any) -> Calibration:
    """The options as a recipe has them.

    Raises:
        RecipeError: If a value does not fit.
    """
    from pydantic import ValidationError

    from moeprune.errors import RecipeError
    from moeprune.recipe import Calibration

    try:
        return Calibration(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{_OPTIONS.get(str(part), str(part).replace('_', '-'))}: " for part in first["loc"][:1])
        raise RecipeError(f"{option}{first['msg'].removeprefix('Value error, ')}.") from error


def _plan_text(facts: dict[str, Any]) -> str:
    """What ``--dry-run`` says."""
    ranks = f" on {facts['ranks']} ranks" if facts["ranks"] > 1 else ""
    lines = [f"{facts['model']}: {sum(facts['tokens'].values()):,} tokens{ranks}, {facts['pass']}: {facts['why']}."]
    lines += [
        f"  {name:<20} {count:>12,} tokens in {facts['rows'][name]:,} rows of {facts['length']:,} ({facts['packing']})"
        for name, count in facts["tokens"].items()
    ]
    lines += [
        f"  {name:<20} {part['most_tokens']:>12,} tokens at most, the model's answers to {part['prompts']:,} prompts"
        for name, part in facts["answers"].items()
    ]
    lines.append(f"  statistics ({facts['statistics']}): {size(facts['bytes'])}")
    if facts["reservoir_bytes"]:
        lines.append(f"  layer inputs of the sample: {size(facts['reservoir_bytes'])}")
    if facts["extra_expert_tokens"]:
        lines.append(f"  experts run on {facts['extra_expert_tokens']:,} tokens beyond those routed to them")
    return "\n".join(lines)


def _result_text(facts: dict[str, Any], out: Path) -> str:
    """What is said of a finished run."""
    run = facts["run"]
    lines = [f"{out}: {facts['tokens']:,} tokens of {len(facts['domains'])} domain(s) in {run['seconds']} s"]
    stopped = run.get("stopped", {})
    lowest = stopped.get("lowest")
    lowest = f" ({lowest['reliability']:.3f} in {lowest['layer']}, the lowest)" if lowest else ""
    if stopped.get("why") == "stable":
        lines.append(f"Stopped: the reliability of {stopped['score']} is {stopped['reliability']:.3f}{lowest}.")
    elif stopped:
        lines.append(
            f"{stopped['score']} was not stable: its reliability is {stopped['reliability']:.3f}{lowest} at the end."
        )
    if facts["never_routed"]:
        lines.append(f"{facts['never_routed']} of {facts['experts']} experts were never chosen.")
    return "\n".join(lines)
