"""What the tests of pruned models share: plans without calibration, logits, and checkpoints to damage."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.anatomy.source import open_source
from moeprune.facts import ModelFacts
from moeprune.plan.plan import LayerPlan, Plan
from tests.models import VOCAB

# Kept experts and top-k of each tiny family: fewer than the model has, and never the same number for both.
COUNTS = {
    "qwen3_moe": (7, 2),
    "qwen2_moe": (7, 2),
    "mixtral": (4, 1),
    "olmoe": (7, 2),
    "deepseek_v2": (9, 2),
    "deepseek_v3": (12, 2),
    "glm4_moe": (7, 2),
    "gpt_oss": (7, 2),
}


def random_plan(facts: ModelFacts, *, keep: int, top_k: int, seed: int = 0) -> Plan:
    """A plan that keeps other random experts in every layer, the same number from each group."""
    rng = random.Random(seed)
    n_group = facts.routing.n_group
    size = facts.num_experts // n_group
    kept: list[tuple[int, ...]] = []
    while len(kept) < len(facts.layers):
        ids = [group * size + i for group in range(n_group) for i in rng.sample(range(size), keep // n_group)]
        if tuple(sorted(ids)) not in kept or keep == facts.num_experts:
            kept.append(tuple(sorted(ids)))
    return Plan(
        model=facts,
        num_experts=keep,
        top_k=top_k,
        layers=tuple(LayerPlan(layer=name, keep=ids) for name, ids in zip(facts.layers, kept, strict=True)),
    )


def plan_for(folder: Path, family: str, *, seed: int = 0) -> Plan:
    """A random plan with the family's :data:`COUNTS` for a checkpoint folder."""
    keep, top_k = COUNTS[family]
    return random_plan(open_source(folder).facts, keep=keep, top_k=top_k, seed=seed)


def logits(model: torch.nn.Module) -> Tensor:
    """Logits of fixed random tokens, enough of them that every expert is used."""
    ids = torch.randint(VOCAB, (3, 21), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any], *, file: str = "model.safetensors") -> None:
    """Change the tensors of one file in place."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
