"""What ``moeprune stats`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MOST = 12


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The facts of :func:`moeprune.cli.stats.describe`, for people."""
    yield (
        f"{facts['model']}: {facts['tokens']:,} tokens, {facts['statistics']} statistics, {facts['never_routed']} of "
        f"{facts['experts']} experts never chosen"
    )
    for run in facts["runs"][:MOST]:
        yield f"  {_run(run)}"
    if len(facts["runs"]) > MOST:
        yield f"  and {len(facts['runs']) - MOST} more runs"
    if facts["absent"]:
        yield f"  without {', '.join(facts['absent'])}, {facts['why_absent']}"
    yield ""
    yield from _coverage(facts)
    yield from _warnings(facts)
    yield from _agreement(facts)
    yield from _reliability(facts)


def _run(run: dict[str, Any]) -> str:
    """How a part of the statistics was made; older files say less of it."""
    said = (
        f"{run['dtype']} on {run['device']}" if {"dtype", "device"} <= run.keys() else "",
        f"rows of {run['length']}" if "length" in run else "",
        f"seed {run['seed']}" if "seed" in run else "",
        f"moeprune {run['moeprune']}" if "moeprune" in run else "",
        _stopped(run.get("stopped") or {}),
    )
    return "run: " + (", ".join(filter(None, said)) or "nothing is recorded of it")


def _stopped(stopped: dict[str, Any]) -> str:
    if stopped.keys() < {"why", "score", "reliability", "wanted"}:
        return ""
    return f"ended: {stopped['why']}, {stopped['score']} {stopped['reliability']:.3f} of {stopped['wanted']} wanted"


def _coverage(facts: dict[str, Any]) -> Iterator[str]:
    rows = [
        [domain["domain"], f"{domain['text']:,}", _spread(domain["tokens"]), str(domain["starved"]),
         str(domain["never_routed"])]
        for domain in facts["coverage"]
    ]  # fmt: skip
    yield from _table(["domain", "tokens", "tokens an expert", "starved", "never"], rows)
    yield ""
    rows = [
        [layer["layer"], f"{layer['load_entropy']:.3f}", f"{layer['busiest']:.2f}", _spread(layer["total"]),
         str(len(layer["starved"])), str(len(layer["never_routed"]))]
        for layer in facts["layers"]
    ]  # fmt: skip
    yield from _table(["layer", "load entropy", "busiest / mean", "tokens an expert", "starved", "never"], rows)
    yield (
        "  tokens an expert: fewest / median / most; starved: experts with fewer than "
        f"{facts['starved_below']}, but some; load entropy: 1 is even"
    )


def _warnings(facts: dict[str, Any]) -> Iterator[str]:
    if empty := [name for name, tokens in facts["domains"].items() if not tokens]:
        yield f"warning: no text was run of {_some(empty)}."
    if facts["unseen_layers"]:
        yield (
            f"warning: no token was routed in {_some(facts['unseen_layers'])}: nothing tells their experts apart. "
            "Calibrate on text that reaches them."
        )
    unseen = {layer["layer"]: layer["never_routed"] for layer in facts["layers"] if layer["never_routed"]}
    if unseen:
        named = _some(f"{layer} {_some(map(str, ids))}" for layer, ids in unseen.items())
        yield (
            f"warning: never chosen: {named}. They are pruned first; if they serve text of another kind that "
            "matters, calibrate on that, too."
        )
    if facts["starved"]:
        yield (
            f"warning: {facts['starved']} experts saw fewer than {facts['starved_below']} tokens; what is said of them "
            "is a guess. Calibrate on more text."
        )
    if found := facts["super_experts"]:
        named = _some(f"{e['layer']} expert {e['expert']} ({e['max_abs']:.3g})" for e in found)
        yield f"super experts, which a plan should keep (largest output): {named}"


def _agreement(facts: dict[str, Any]) -> Iterator[str]:
    if facts["agreement"] is None:
        yield ""
        yield f"domains are not compared: these statistics do not tell {facts['score']} by domain."
    elif facts["agreement"]:
        yield ""
        rows = [[" and ".join(pair["domains"]), f"{pair['correlation']:.3f}", f"{pair['overlap']:.1%}"]
                for pair in facts["agreement"]]  # fmt: skip
        yield from _table(
            [f"domains, ranked by {facts['score']}", "rank correlation", f"same {facts['keep']:.0%}"], rows
        )


def _reliability(facts: dict[str, Any]) -> Iterator[str]:
    yield ""
    if not facts["reliability"]:
        yield "enough text? These statistics do not tell even from odd rows, which would say it. Calibrate again."
        return
    rows = [
        [half["score"], *((f"{half['correlation']:.3f}", f"{half['overlap']:.1%}") if half["layers"] else "--")]
        for half in facts["reliability"]
    ]
    yield from _table(["enough text?", "reliability", f"same {facts['keep']:.0%}"], rows)
    yield "  reliability: rank correlation of the two halves of the text, for the whole of it (Spearman-Brown), mean"
    yield "  of the layers. 1: more text of this kind changes no rank. Where it is low, calibrate on more (--tokens),"
    yield "  or let --until-stable 0.98 say how much."
    yield "  same: share of kept experts that both halves name, not corrected."
    if facts["reliability_unknown"]:
        yield f"  not known of {', '.join(facts['reliability_unknown'])}: not all that it needs is kept by halves."


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
