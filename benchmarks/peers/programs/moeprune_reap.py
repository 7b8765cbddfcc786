"""A plain forward pass, or moeprune's calibration with the choice of experts by REAP; in moeprune's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from clock import answer, request, timed
from safetensors.torch import load_file

from moeprune import __version__
from moeprune.anatomy.source import open_source
from moeprune.calibrate.passes import collect_stats
from moeprune.calibrate.rows import Rows
from moeprune.checkpoint.load import load_model
from moeprune.plan.uniform import make_plan
from moeprune.score import SCORES


def main() -> None:
    """Load, warm up, time."""
    asked = request()
    torch.set_num_threads(1)
    ids = load_file(asked["ids"])["ids"]
    rows = Rows("text", ids, torch.ones_like(ids, dtype=torch.bool))
    model = load_model(Path(asked["model"]), dtype=asked["dtype"], device="cpu")
    batch_size = asked["batch_size"]

    def plain(batches: Any) -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(input_ids=batch, use_cache=False)

    def calibrated() -> Any:
        source = open_source(asked["model"])
        stats = collect_stats(
            model, anatomy=source.anatomy, facts=source.facts, domains=[rows], batch_size=batch_size, quiet=True,
            statistics=asked["what"],
        )  # fmt: skip
        return stats, make_plan(stats, score="reap", keep=asked["keep"])

    plain(ids[:batch_size].split(batch_size))
    versions = {"moeprune": __version__, "transformers": transformers.__version__}
    if asked["what"] == "plain":
        _, spent = timed(lambda: plain(ids.split(batch_size)))
        answer(versions=versions, **spent)
        return
    (stats, plan), spent = timed(calibrated)
    count = stats.experts["count"][0]
    answer(
        versions=versions, kept=[list(layer.keep) for layer in plan.layers],
        saliency=SCORES.get("reap").saliency(stats).tolist(),
        load=[[float(layer.min()), float(layer.max())] for layer in count / count.mean(axis=1, keepdims=True)], **spent,
    )  # fmt: skip


if __name__ == "__main__":
    main()
