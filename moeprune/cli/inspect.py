"""``moeprune inspect``."""

from __future__ import annotations

from typing import Any

import typer

from moeprune.cli.options import Json, ModelArgument, print_json


def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Say how a model is built, how large it is, and what pruning would leave. No weight is read.

    A folder that holds config.json alone is enough.

    Example: `moeprune inspect demo`
    """
    from moeprune.anatomy.inspect import inspect_model
    from moeprune.checkpoint.folder import resolve_model

    facts = inspect_model(resolve_model(model))
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n".join(_lines(model, facts)))


def _lines(model: str, facts: dict[str, Any]) -> list[str]:
    from moeprune.format import count, size

    parameters, stored = facts["parameters"], facts["bytes"]
    shared = f" + {facts['shared_experts']} shared" if facts["shared_experts"] else ""
    where = "" if facts["weights_read_from"] == "headers" else "  (from the config; no weights here)"
    lines = [
        f"{model}: {facts['model_type']} ({facts['architecture']})",
        f"  layers       {facts['num_layers']}, {len(facts['moe_layers'])} of them with experts",
        f"  experts      {facts['num_experts']} a layer{shared}, top-{facts['top_k']}",
        f"  router       {facts['router']}",
        f"  parameters   {count(parameters['total'])}, {count(parameters['active'])} active a token (embeddings "
        "included)",
        f"  stored       {size(stored['total'])}, {size(stored['an_expert'])} an expert{where}",
        "",
        f"  {'part':<16} {'parameters':>12} {'bytes':>12} {'share':>7}",
    ]
    for part, number in parameters["by_part"].items():
        if number:
            num_bytes = stored["by_part"][part]
            lines.append(f"  {part:<16} {count(number):>12} {size(num_bytes):>12} {num_bytes / stored['total']:>7.1%}")
    lines += ["", f"  {'pruning':<10} {'experts':>8} {'parameters':>12} {'active':>10} {'bytes':>12}"]
    for row in facts["pruned"]:
        lines.append(
            f"  {row['prune']:<10.0%} {row['num_experts']:>8} {count(row['parameters']):>12} "
            f"{count(row['active']):>10} "
            f"{size(row['bytes']):>12}"
        )
    return lines
