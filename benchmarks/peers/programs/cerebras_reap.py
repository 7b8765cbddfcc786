"""REAP by its authors' code (https://github.com/CerebrasResearch/reap); in an environment of its own.

``src/reap/main.py`` imports vLLM and plotting libraries, which calibration does not use. So its observer is imported
from ``src/reap/observer.py`` as published, set up as ``_setup_observer`` does, and fed as ``record_activations`` does;
experts are then chosen as in ``prune`` (``src/reap/prune.py``).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
import transformers
from clock import answer, request, timed
from safetensors.torch import load_file


def main() -> None:
    """Load, warm up, time."""
    asked = request()
    sys.path.insert(0, f"{asked['code']}/src")
    from reap.observer import OBSERVER_CONFIG_REGISTRY, MoETransformerObserver

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    ids = load_file(asked["ids"])["ids"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        asked["model"], torch_dtype=getattr(torch, asked["dtype"])
    )
    with torch.no_grad():
        model(input_ids=ids[: asked["batch_size"]])
    mask = torch.ones(asked["batch_size"], ids.shape[1], dtype=torch.long)

    def observed() -> Any:
        observer = MoETransformerObserver(
            model=model,
            hook_config=OBSERVER_CONFIG_REGISTRY[type(model).__name__](
                distance_measure="cosine", renormalize_router_weights=model.config.norm_topk_prob,
                record_pruning_metrics_only=True,
            ),
        )  # fmt: skip
        with torch.no_grad():
            for batch in ids.split(asked["batch_size"]):
                sample = {"input_ids": batch, "attention_mask": mask[: len(batch)]}
                with observer.set_attention_mask(sample["attention_mask"]):
                    model(**sample)
        state = observer.report_state()
        kept = []
        for layer in state:
            saliency = state[layer]["reap"]
            num_pruned = int(len(saliency) * (1 - asked["keep"]))
            _, pruned = torch.topk(saliency, num_pruned, largest=False)
            kept.append(sorted(set(range(len(saliency))) - set(pruned.tolist())))
        return kept, [state[layer]["reap"].tolist() for layer in state]

    (kept, saliency), spent = timed(observed)
    answer(versions={"transformers": transformers.__version__}, kept=kept, saliency=saliency, **spent)


if __name__ == "__main__":
    main()
