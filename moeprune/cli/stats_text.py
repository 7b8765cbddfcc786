"""What ``moeprune stats`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MOST = 12


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts of :func:`moeprune.cli.stats.describe`, for people."""
    yield (
        f"{facts['model']}: {facts['tokens']:,} tokens, {facts['never_routed']} of {facts['experts']} experts "
        "never chosen"
    )
    if facts["absent"]:
        yield f"  these statistics have no {', no '.join(facts['absent'])}"
    for name, tokens in facts["domains"].items():
        yield f"  {name:<20} {tokens:>12,} tokens"
    yield ""
    yield from _coverage(facts)
    yield from _warnings(facts)
    yield from _agreement(facts)
    yield from _reliability(facts)


def _coverage(facts: dict[str, Any]) -> Iterator[str]:
    domains = [name for name, tokens in facts["domains"].items() if tokens]
    head = ["layer", "load entropy", "busiest / mean", *(f"tokens an expert, {name}" for name in domains), "starved",
            "never"]  # fmt: skip
    rows = [
        [
            layer["layer"], f"{layer['load_entropy']:.3f}", f"{layer['busiest']:.2f}",
            *(_spread(layer["tokens"][name]) for name in domains),
            str(len(layer["starved"])), str(len(layer["never_routed"])),
        ]
        for layer in facts["layers"]
    ]  # fmt: skip
    yield from _table(head, rows)
    yield "  load entropy: 1 is even. Tokens an expert: fewest / median / most."


def _warnings(facts: dict[str, Any]) -> Iterator[str]:
    if facts["unseen_layers"]:
        yield f"warning: no token was routed in {_some(facts['unseen_layers'])}."
    unseen = {layer["layer"]: layer["never_routed"] for layer in facts["layers"] if layer["never_routed"]}
    if unseen:
        named = _some(f"{layer} {_some(map(str, ids))}" for layer, ids in unseen.items())
        yield f"warning: never chosen: {named}."
    if facts["starved"]:
        yield (
            f"warning: {facts['starved']} experts saw fewer than 32 tokens; what is said of them is a guess. Calibrate "
            "on more text."
        )
    found = facts["super_experts"]
    if found:
        named = _some(f"{e['layer']} expert {e['expert']} ({e['max_abs']:.3g})" for e in found)
        yield f"super experts, which must be kept (largest output): {named}"


def _agreement(facts: dict[str, Any]) -> Iterator[str]:
    if not facts["agreement"]:
        return
    yield ""
    rows = [[" and ".join(pair["domains"]), f"{pair['correlation']:.3f}", f"{pair['overlap']:.1%}"]
            for pair in facts["agreement"]]  # fmt: skip
    yield from _table([f"domains, ranked by {facts['score']}", "rank correlation", f"same {facts['keep']:.0%}"], rows)


def _reliability(facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    if not facts["reliability"]:
        yield "these statistics do not tell even from odd rows: how well they repeat is not known."
        return
    rows = [[half["score"], f"{half['correlation']:.3f}", f"{half['overlap']:.1%}"] for half in facts["reliability"]]
    yield from _table(["enough text?", "reliability", f"same {facts['keep']:.0%}"], rows)
    yield (
        "  reliability: rank correlation of the two halves of the text, for the whole of it (Spearman-Brown), mean of "
        "the layers."
    )
    yield "  same: share of kept experts that both halves name, not corrected."


def diff_lines(facts: dict[str, Any], *, names: Sequence[str]) -> Iterator[str]:
    """The facts of :func:`moeprune.calibrate.coverage.difference`, for people."""
    for name, tokens, domains in zip(names, facts["tokens"], facts["domains"], strict=True):
        yield f"{name}: {tokens:,} tokens of {', '.join(domains)}"
    yield f"  by {facts['score']} both keep {facts['overlap']:.1%} of {facts['keep']} experts a layer"
    differences = facts["largest_difference"].items()
    rows = [[name, "only one has it" if value is None else f"{value:.2%}"] for name, value in differences]
    yield from _table(["quantity, a token", "largest difference"], rows)
    rows = [
        [
            layer["layer"], "-" if layer["correlation"] is None else f"{layer['correlation']:.3f}",
            f"{layer['overlap']:.1%}", _some(map(str, layer["only_first"])), _some(map(str, layer["only_second"])),
        ]
        for layer in facts["layers"]
    ]  # fmt: skip
    yield from _table(["layer", "rank correlation", "same", "only A keeps", "only B keeps"], rows)


def _spread(tokens: Sequence[float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in tokens)


def _some(items: Iterable[str]) -> str:
    found = list(items)
    return ", ".join(found[:MOST]) + (f" and {len(found) - MOST} more" if len(found) > MOST else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield ("  " + "   ".join([row[0].ljust(widths[0]), *cells[1:]])).rstrip()
