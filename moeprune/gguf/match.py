"""Whether a plan made for a Hugging Face model fits a GGUF file.

Fingerprints cannot be compared across formats. What can be is compared: architecture, blocks with experts, counts and
groups. llama.cpp's converter stacks experts in the order of their ids (``torch.stack`` over ``range(n_experts)`` in
``conversion/*.py``; one that is stacked already keeps its order): expert 5 of the plan is expert 5 of the file.
"""

from __future__ import annotations

import re

from moeprune.errors import PlanError
from moeprune.gguf.model import GgufModel
from moeprune.plan.plan import Plan

# model_type of transformers -> general.architecture of llama.cpp, where the two differ in more than punctuation
# (the classes registered in llama.cpp's conversion/*.py).
ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
    "glm4_moe_lite": "deepseek2",
    "glm4v_moe": "glm4moe",
    "glm_moe_dsa": "glm-dsa",
    "granitemoe_swa": "granite_swa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "kimi_k2": "deepseek2",
    "mimo_v2_flash": "mimo2",
    "minimax_m3_vl": "minimax-m3",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",
    "qwen3_omni_moe": "qwen3vlmoe",
    "solar_open": "glm4moe",
    "step3p7": "step35",
}


def match_plan(model: GgufModel, plan: Plan) -> dict[int, tuple[int, ...]]:
    """Kept expert ids by block, those of blocks for multi-token prediction included.

    The latter have experts of their own that calibration does not see; all blocks share one expert count, so they keep
    the same ids as the last block before them. They decide no token, only which drafts are proposed.

    Args:
        model: The GGUF file.
        plan: A plan that is consistent in itself.

    Raises:
        PlanError: If the plan is for another model, or leaves what llama.cpp cannot run.
    """
    path, planned = model.file.path, plan.model
    expected = architecture_of(planned.model_type)
    if _plain(expected) != _plain(model.architecture):
        raise PlanError(
            f"{path}: architecture {model.architecture}; the plan is for {planned.name} ({planned.model_type}), which "
            f"llama.cpp calls {expected}. Plan for the model that this file was made from."
        )
    keep = {block_of(layer): ids for layer, ids in plan.keep.items()}
    for what, in_plan, in_file in (
        ("experts in blocks", tuple(sorted(keep)), model.blocks),
        ("experts a block", planned.num_experts, model.num_experts),
    ):
        if in_plan != in_file:
            raise PlanError(f"{path}: {what} {in_file}; the plan is for {planned.name} with {in_plan}.")
    _match_routing(model, plan)
    if plan.num_experts < 2:
        raise PlanError(f"{path}: llama.cpp takes a model with 1 expert for a dense one. Keep at least 2.")
    if model.mtp_blocks and plan.mtp == "drop":
        raise PlanError(
            f"{path}: the plan drops multi-token prediction, and blocks are not taken out of a GGUF file. Set mtp to "
            "prune in the plan, or export the Hugging Face checkpoint and convert the result."
        )
    last = keep[model.blocks[-1]]
    return keep | dict.fromkeys(model.mtp_blocks, last)


def architecture_of(model_type: str) -> str:
    """The name that llama.cpp gives to a ``model_type`` of transformers, up to punctuation."""
    text_only = model_type.removesuffix("_text")
    return ARCHITECTURES.get(text_only, text_only.replace("_", ""))


def block_of(layer: str) -> int:
    """The block that a decoder layer became: ``model.layers.3`` -> 3.

    Raises:
        PlanError: If the path does not end in a number.
    """
    match = re.search(r"(\d+)$", layer)
    if match is None:
        raise PlanError(f"{layer}: expected the path of a decoder layer that ends in its number, as in model.layers.3.")
    return int(match[1])


def _match_routing(model: GgufModel, plan: Plan) -> None:
    path, planned = model.file.path, plan.model
    if model.top_k != (planned.top_k,):
        raise PlanError(
            f"{path}: {' or '.join(map(str, model.top_k))} active experts; the plan is for {planned.name} with "
            f"{planned.top_k}. If the file's {model.architecture}.expert_used_count was changed on purpose, change "
            "model.top_k in the plan to it."
        )
    routing = planned.routing
    for key, in_plan, in_file in (
        ("expert_group_count", routing.n_group, model.n_group),
        ("expert_group_used_count", routing.topk_group, model.topk_group),
    ):
        # Files older than llama.cpp's group-limited routing lack the keys; what fits groups also fits none.
        if in_file not in (None, 0, in_plan) and (key, routing.n_group) != ("expert_group_used_count", 1):
            raise PlanError(f"{path}: {key} {in_file}; the plan is for {planned.name} with {in_plan}.")


def _plain(name: str) -> str:
    return re.sub(r"[-_]", "", name.lower())
