"""``moeprune inspect``."""

from __future__ import annotations

from typing import Any

import typer

from moeprune.cli.options import Json, ModelArgument, print_json

MOST_RANGES = 6


def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Say how a model is built, how large it is, and what pruning would leave. No weight is read.

    A folder that holds config.json alone is enough; a GGUF file will do as well.

    Example: `moeprune inspect demo`
    """
    from moeprune.gguf.file import is_gguf

    if is_gguf(model):
        from moeprune.gguf.inspect import describe_gguf, inspect_gguf

        facts = inspect_gguf(model)
        lines = describe_gguf(model, facts)
    else:
        from moeprune.anatomy.inspect import inspect_model
        from moeprune.checkpoint.hub import locate

        facts = inspect_model(locate(model).folder)
        lines = [*_lines(model, facts), "", *_parts(facts), "", *_pruned(facts)]
    if as_json:
        print_json(facts)
    else:
        typer.echo("\n".join(lines))


def _lines(model: str, facts: dict[str, Any]) -> list[str]:
    from moeprune.format import count, size

    parameters, stored, mtp = facts["parameters"], facts["bytes"], facts["multi_token_prediction"]
    shared = f" + {facts['shared_experts']} shared" if facts["shared_experts"] else ""
    dense = f" (dense: {_numbers(facts['dense_layers'])})" if facts["dense_layers"] else ""
    lookup = parameters["by_part"]["embeddings"]  # makers differ in whether they count it
    rows = {
        "layers": f"{facts['num_layers']}, {len(facts['moe_layers'])} of them with experts{dense}",
        "experts": f"{facts['num_experts']} a layer{shared}, top-{facts['top_k']}",
        "router": facts["router"],
        "context": f"{facts['context']:,} tokens" if facts["context"] else None,
        "parameters": f"{count(parameters['total'])}, {count(parameters['active'])} active a token ({count(lookup)} of "
        "them the input embedding)",
        "stored": f"{size(stored['total'])}, {size(stored['an_expert'])} an expert{_where(facts)}",
        "quantised": facts["quantisation"] and facts["quantisation"]["title"],
        "prediction": mtp and _prediction(mtp, stored=facts["weights_read_from"] == "headers"),
    }
    title = f"{model}: {facts['model_type']} ({facts['architecture']})"
    return [title, *(f"  {name:<12} {text}" for name, text in rows.items() if text)]


def _where(facts: dict[str, Any]) -> str:
    dtypes, total = facts["bytes"]["by_dtype"], facts["bytes"]["total"]
    if not dtypes:
        return "  (from the config; no weights here)"
    if len(dtypes) == 1:
        return f"  ({next(iter(dtypes))})"
    return f"  ({', '.join(f'{name} {number / total:.1%}' for name, number in dtypes.items())})"


def _prediction(mtp: dict[str, Any], *, stored: bool) -> str:
    from moeprune.format import count, size

    number = "" if mtp["layers"] is None else f"{mtp['layers']} "
    text = f"{number}multi-token prediction layer{'' if mtp['layers'] == 1 else 's'}"
    if stored and not mtp["bytes"]:
        return f"{text} in the config, none stored"
    size_of = f", {count(mtp['parameters'])} in {size(mtp['bytes'])}" if stored else ""
    return f"{text}{size_of}, not among the parameters"


def _numbers(layers: list[str]) -> str:
    """Layers by their number, neighbours as a range, the middle of a long list left out: ``0-2, 7``."""
    runs: list[list[int]] = []
    for number in (int(name.rpartition(".")[2]) for name in layers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    texts = ["-".join(str(number) for number in run) for run in runs]
    return ", ".join([*texts[:3], "...", texts[-1]] if len(texts) > MOST_RANGES else texts)


def _parts(facts: dict[str, Any]) -> list[str]:
    from moeprune.format import count, size

    numbers, stored = facts["parameters"]["by_part"], facts["bytes"]
    lines = [f"  {'part':<22} {'parameters':>12} {'bytes':>12} {'share':>7}"]
    for part, num_bytes in stored["by_part"].items():
        number = numbers.get(part, facts["multi_token_prediction"] and facts["multi_token_prediction"]["parameters"])
        if number or num_bytes:
            lines.append(f"  {part:<22} {count(number):>12} {size(num_bytes):>12} {num_bytes / stored['total']:>7.1%}")
    return lines


def _pruned(facts: dict[str, Any]) -> list[str]:
    from moeprune.format import count, size

    lines = [f"  {'pruning':<10} {'experts':>8} {'parameters':>12} {'active':>10} {'bytes':>12}"]
    for row in facts["pruned"]:
        lines.append(
            f"  {row['prune']:<10.0%} {row['num_experts']:>8} {count(row['parameters']):>12} "
            f"{count(row['active']):>10} "
            f"{size(row['bytes']):>12}"
        )
    return lines
