"""Apply a plan to a model in memory: the same tensors that the exporter would write, without writing them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeprune.anatomy.anatomy import Anatomy, kept_runs
from moeprune.anatomy.pruned_config import prune_config
from moeprune.anatomy.quirks.expert_ids import remap_expert_ids
from moeprune.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_plan(model: PreTrainedModel, *, plan: Plan, anatomy: Anatomy) -> PreTrainedModel:
    """A pruned model beside the original, which stays as it is.

    The pruned model is built from the pruned config, so that every module has the counts it would have after a reload;
    tensors without experts are shared with the original, the others are copies of the kept slices.

    Args:
        model: The original model.
        plan: A plan for it.
        anatomy: Where the original keeps its experts.

    Returns:
        A model of the same class, in evaluation mode, on the same device.

    Raises:
        PlanError: If the plan contradicts itself or the model's layers and counts.
    """
    plan.check(anatomy.facts(name=plan.model.name, fingerprint=plan.model.fingerprint))
    config = prune_config(anatomy, num_experts=plan.num_experts, top_k=plan.top_k, n_group=plan.n_group)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        pruned = type(model)._from_config(config)
    pruned.set_experts_implementation(model.get_experts_implementation())
    pruned.load_state_dict(pruned_state(model, plan=plan, anatomy=anatomy), strict=True, assign=True)
    _copy_buffers(model, pruned)
    pruned.tie_weights()
    pruned.requires_grad_(False)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.eval()


def pruned_state(model: PreTrainedModel, *, plan: Plan, anatomy: Anatomy) -> dict[str, Tensor]:
    """The state dict of the pruned model: kept slices of the tensors with an expert axis, all others as they are."""
    keep, state = plan.keep, {}
    for name, tensor in model.state_dict().items():
        new = pruned_name(name, keep=keep, anatomy=anatomy)
        if new is not None:
            state[new] = pruned_tensor(name, tensor, keep=keep, top_k=plan.top_k, anatomy=anatomy)
    return state


Keep = Mapping[str, Sequence[int]]
"""Kept expert ids by layer (:attr:`moeprune.plan.plan.Plan.keep`)."""


def pruned_name(name: str, *, keep: Keep, anatomy: Anatomy) -> str | None:
    """What a parameter is called in the pruned model; None if it belongs to an expert that goes."""
    own = anatomy.own.get(name)
    if own is None:
        return name
    kept = keep[own.layer]
    return own.renumbered(kept.index(own.expert)) if own.expert in kept else None


def pruned_tensor(name: str, tensor: Tensor, *, keep: Keep, top_k: int, anatomy: Anatomy) -> Tensor:
    """What the pruned model has of the original parameter ``name``."""
    axis, before = anatomy.axes.get(name), anatomy.num_experts.value
    if axis is not None and len(keep[axis.layer]) < before:
        runs = kept_runs(keep[axis.layer], num_experts=before, rows=axis.rows, extra=axis.extra)
        return torch.cat([tensor.narrow(axis.dim, start, stop - start) for start, stop in runs], dim=axis.dim)
    if name in anatomy.expert_ids:
        ids = keep[anatomy.expert_ids[name]]
        table = remap_expert_ids(tensor.cpu().numpy(), keep=ids, num_experts=before, top_k=top_k)
        return torch.from_numpy(table).to(tensor.device)
    return tensor


def _copy_buffers(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Give ``pruned`` the buffers that no state dict holds, such as rotary frequencies."""
    original = dict(model.named_buffers())
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta:
            assert original[name].shape == buffer.shape, f"buffer {name} changes with the number of experts"
            parent, _, leaf = name.rpartition(".")
            setattr(pruned.get_submodule(parent), leaf, original[name])
    left = [name for name, tensor in [*pruned.named_parameters(), *pruned.named_buffers()] if tensor.is_meta]
    assert not left, f"no values for {left[:3]}"
