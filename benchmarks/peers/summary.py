"""The measurements as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summarise(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of times and memory, and a line for each comparison of kept experts and of causality."""
    lines = [
        "", "| tool | dtype | CPU s | x plain | x moeprune | wall s | peak MiB | of it the work |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found:
        if "cpu_seconds" in row:
            plain, ours = row["times_plain"], row["times_moeprune"]
            lines.append(
                f"| {row['tool']} | {row['dtype']} | {row['cpu_seconds']:.2f} | {_range(plain)} | {_range(ours)} | "
                f"{row['wall_seconds']:.1f} | {row['peak_mib']} | {row['work_mib']} |"
            )
    lines += ["", "| kept experts in common with moeprune | model | a layer | Jaccard |", "|---|---|---|---|"]
    for row in found:
        if "common" in row:
            common, jaccard = (", ".join(map(str, row[name])) for name in ("common", "jaccard"))
            lines.append(f"| {row['tool']} | {row['model']} | {common} of {row['kept']} | {jaccard} |")
    for row in found:
        for rows, by_pass in row.get("difference", {}).items():
            lines.append(f"\n{row['model']} model, {rows}: what the first MoE block is given for a beginning that two")
            lines.append(f"rows share differs by at most (standard deviation {row['scale']:.2f}):")
            lines += [f"  {what}: {difference:.3g}" for what, difference in by_pass.items()]
        if "why" in row:
            lines.append(f"\n{row['tool']} was not measured: {row['why']}")
    return "\n".join(lines)


def _range(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
