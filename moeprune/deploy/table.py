"""The rules as a table for people: ``docs/engines.md`` and ``moeprune ls engines``."""

from __future__ import annotations

import moeprune.deploy.rules  # noqa: F401  # fills the table
from moeprune.deploy.rule import RULES, SEVERITIES
from moeprune.deploy.serving import VERSIONS

INTRODUCTION = """# What each engine asks of a pruned model

`moeprune check` holds a checkpoint or a plan against these rules, `moeprune plan --for ENGINE` chooses a number of
experts that fits them, and `moeprune export` names those that the pruned model breaks and the original does not. A rule
whose facts are not known is reported as not checked, never as passed.

Read in the sources of {versions}. Paths begin at
`vllm/model_executor/`, `sglang/`, the root of llama.cpp and `transformers/`. What concerns GPUs was read, not run.

This page is generated from `moeprune/deploy/rules/`: `python -m moeprune.deploy.table > docs/engines.md`.
"""


def markdown() -> str:
    """The page."""
    names = sorted(RULES, key=lambda name: (SEVERITIES.index(RULES.get(name).severity), name))
    rows = [RULES.get(name) for name in names]
    lines = ["| rule | severity | engines | what must hold | read in |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {row.severity} | {', '.join(row.engines)} | {row.summary} | {row.source} |" for row in rows
    ]
    versions = ", ".join(f"{engine} {version}" for engine, version in VERSIONS.items())
    return INTRODUCTION.format(versions=versions) + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
