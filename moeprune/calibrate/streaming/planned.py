"""A plan applied to a model that runs layer by layer: every layer is read whole and cut before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.pruned_config import prune_config
from moeprune.apply.memory import pruned_name, pruned_tensor
from moeprune.calibrate.streaming.skeleton import Skeleton, empty_model
from moeprune.calibrate.streaming.weights import Weights
from moeprune.checkpoint.header import TensorInfo
from moeprune.plan.plan import Plan


class PlannedWeights(Weights):
    """The pruned model and its weights, made of those of the original.

    The model is built from the pruned config, as :func:`moeprune.apply.memory.apply_plan` does.

    Args:
        original: The original model.
        tensors: Its stored tensors.
        device: Where parameters go.
        plan: The plan.
        anatomy: Where the original keeps its experts.

    Raises:
        PlanError: If the plan contradicts itself or the model's layers and counts.
    """

    def __init__(
        self,
        original: Skeleton,
        tensors: Mapping[str, TensorInfo],
        *,
        device: torch.device,
        plan: Plan,
        anatomy: Anatomy,
    ):
        plan.check(anatomy.facts(name=plan.model.name, fingerprint=plan.model.fingerprint))
        config = prune_config(anatomy, num_experts=plan.num_experts, top_k=plan.top_k, n_group=plan.n_group)
        pruned = empty_model(type(original.model), config, dtype=original.dtype, device=device)
        super().__init__(replace(original, model=pruned), {}, device=device)
        self._whole = Weights(original, tensors, device=device)
        self._keep, self._top_k, self._anatomy = plan.keep, plan.top_k, anatomy
        names = {name: pruned_name(name, keep=self._keep, anatomy=anatomy) for name in original.model.state_dict()}
        self._new = {name: new for name, new in names.items() if new is not None}
        self._old = {new: name for name, new in self._new.items()}

    def num_bytes(self, path: str) -> int:
        """Memory that the parameters of the original take, which is read first."""
        return self._whole.num_bytes(path)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read parameters of the original and cut them."""
        made = {}
        for name, tensor in self._whole.read([self._old[name] for name in names]).items():
            if name in self._new:
                made[self._new[name]] = pruned_tensor(
                    name, tensor, keep=self._keep, top_k=self._top_k, anatomy=self._anatomy
                )
        return made
