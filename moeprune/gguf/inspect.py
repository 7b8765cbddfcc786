"""Facts about a GGUF file, for people and programs. No tensor data is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from moeprune.format import count, size
from moeprune.gguf.file import open_gguf
from moeprune.gguf.model import GgufModel, read_model

SHARES = (0.25, 0.5)


def inspect_gguf(path: str | Path) -> dict[str, Any]:
    """What a GGUF file holds and what pruning would leave of it.

    Args:
        path: The file; of a split model, any part.

    Raises:
        CheckpointError: If it is incomplete or damaged.
        UnsupportedModelError: If it has no experts, or stores them in a way that is not understood.
    """
    model = read_model(open_gguf(path))
    file = model.file
    types = Counter[str]()
    for tensor in file.tensors.values():
        types[tensor.kind.name] += tensor.num_bytes
    return {
        "format": "gguf",
        "files": [str(part) for part in file.files],
        "architecture": model.architecture,
        "name": file.text("general.name"),
        "num_blocks": model.num_blocks,
        "moe_blocks": list(model.blocks),
        "mtp_blocks": list(model.mtp_blocks),
        "num_experts": model.num_experts,
        "top_k": list(model.top_k),
        "n_group": model.n_group,
        "topk_group": model.topk_group,
        "parameters": {
            "total": model.parameters,
            "active": model.active(num_experts=model.num_experts, top_k=model.top_k[-1]),
            "routed_experts": model.expert_parameters,
        },
        "bytes": {
            "total": file.num_bytes,
            "routed_experts": model.expert_bytes,
            "an_expert": _an_expert(model, model.expert_bytes),
            "by_type": dict(types.most_common()),
        },
        "pruned": [_pruned(model, share) for share in SHARES],
    }


def describe_gguf(path: str | Path, facts: dict[str, Any]) -> list[str]:
    """The facts of :func:`inspect_gguf` as lines for people."""
    parameters, stored = facts["parameters"], facts["bytes"]
    groups = f", {facts['topk_group']} of {facts['n_group']} groups" if (facts["n_group"] or 0) > 1 else ""
    mtp = f", {len(facts['mtp_blocks'])} more for multi-token prediction" if facts["mtp_blocks"] else ""
    parts = f", {len(facts['files'])} parts" if len(facts["files"]) > 1 else ""
    lines = [
        f"{path}: {facts['architecture']} (GGUF{parts})",
        f"  blocks       {facts['num_blocks']}, {len(facts['moe_blocks'])} of them with experts{mtp}",
        f"  experts      {facts['num_experts']} a block, top-{' or '.join(map(str, facts['top_k']))}{groups}",
        f"  parameters   {count(parameters['total'])}, {count(parameters['active'])} active a token",
        f"  stored       {size(stored['total'])}, {size(stored['an_expert'])} an expert",
        f"  types        {', '.join(f'{name} {size(number)}' for name, number in stored['by_type'].items())}",
        "",
        f"  {'pruning':<10} {'experts':>8} {'bytes':>12}",
    ]
    lines += [f"  {row['prune']:<10.0%} {row['num_experts']:>8} {size(row['bytes']):>12}" for row in facts["pruned"]]
    return lines


def _an_expert(model: GgufModel, total: int) -> int:
    return total // (model.num_experts * len((*model.blocks, *model.mtp_blocks)))


def _pruned(model: GgufModel, share: float) -> dict[str, Any]:
    groups = model.n_group or 1
    kept = max(1, round((1 - share) * model.num_experts / groups)) * groups
    sliced = sum(model.file.tensors[name].num_bytes for name in model.roles)
    left = model.file.num_bytes - sliced // model.num_experts * (model.num_experts - kept)
    return {"prune": share, "num_experts": kept, "bytes": left}
