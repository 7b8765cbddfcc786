"""Map the tensors of a checkpoint to the experts they hold.

A checkpoint may store each expert by itself (``experts.7.up_proj.weight``) or all experts of a layer in one tensor,
under the names of any era; transformers' own key mapping says which tensor of the model a stored key becomes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeprune.anatomy.anatomy import Anatomy, ExpertAxis
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import CheckpointError, UnsupportedModelError

EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")
ROUTED_EXPERTS = re.compile(r"(?:^|\.)experts\.")


@dataclass(frozen=True, slots=True)
class OneExpert:
    """A tensor of one expert. ``key[start:stop]`` is its number."""

    layer: str
    expert: int
    start: int
    stop: int

    def renumbered(self, key: str, expert: int) -> str:
        """``key`` with another expert number."""
        return f"{key[: self.start]}{expert}{key[self.stop :]}"


@dataclass(frozen=True, slots=True)
class AllExperts:
    """A tensor with all experts of a layer along ``dim``."""

    layer: str
    dim: int


Role = OneExpert | AllExperts


def map_stored(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> dict[str, Role]:
    """The role of every stored tensor that depends on the experts; all others are to be kept as they are.

    Args:
        anatomy: The model.
        tensors: The tensors of a checkpoint, by stored key.

    Raises:
        CheckpointError: If experts or other tensors of the model are missing from the checkpoint.
        UnsupportedModelError: If the checkpoint holds experts that the model does not have (MTP layers), or stores an
            expert axis in another way than the model.
    """
    rename = _Renamer(anatomy)
    roles: dict[str, Role] = {}
    seen: dict[tuple[str, str], set[int]] = defaultdict(set)  # (tensor of the model, stored pattern) -> experts
    elements: Counter[str] = Counter()  # by tensor of the model
    for key, info in tensors.items():
        name, is_pattern = rename(key)
        axis = anatomy.axes.get(name)
        number = EXPERT_NUMBER.search(key)
        elements[name] += info.numel
        if axis is None:
            if name not in rename.known and (number or ROUTED_EXPERTS.search(key)):
                raise UnsupportedModelError(
                    f"{info.file.parent}: {key!r} belongs to experts that transformers does not load "
                    "(multi-token prediction layers or a quantised format). Pruning such checkpoints is not "
                    "supported yet."
                )
            seen[name, key] = set()
        elif is_pattern and number:
            role = OneExpert(axis.layer, int(number.group()), *number.span())
            roles[key] = role
            seen[name, role.renumbered(key, -1)].add(role.expert)
        else:
            roles[key] = _checked(anatomy, axis, info)
            seen[name, key] = set(range(anatomy.num_experts.value))
    _check_complete(anatomy, seen, elements, next(iter(tensors.values())).file.parent)
    return roles


def model_names(anatomy: Anatomy, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The tensor of the model that each stored tensor becomes (or a part of it)."""
    rename = _Renamer(anatomy)
    return {key: rename(key)[0] for key in tensors}


def _checked(anatomy: Anatomy, axis: ExpertAxis, info: TensorInfo) -> AllExperts:
    in_memory = anatomy.skeleton.state_dict()[axis.name].shape
    if len(info.shape) != len(in_memory) or info.shape[axis.dim] != in_memory[axis.dim]:
        raise UnsupportedModelError(
            f"{info.file}: {info.name!r} is stored as {list(info.shape)}, the model has {list(in_memory)} with the "
            f"experts on axis {axis.dim}. This layout is not supported."
        )
    return AllExperts(axis.layer, axis.dim)


def _check_complete(
    anatomy: Anatomy, seen: Mapping[tuple[str, str], set[int]], elements: Mapping[str, int], folder: Path
) -> None:
    stored = {name for name, _ in seen}
    by_identity: dict[int, set[str]] = defaultdict(set)
    for name, tensor in anatomy.skeleton.state_dict(keep_vars=True).items():
        by_identity[id(tensor)].add(name)
    for names in by_identity.values():  # tied tensors share one stored copy
        if not names & stored:
            raise CheckpointError(
                f"{folder}: no stored tensor for {min(names)!r} of the model. Download the checkpoint again."
            )
    for (name, pattern), experts in seen.items():
        if name not in anatomy.axes:
            continue
        lacking = set(range(anatomy.num_experts.value)) - experts
        if lacking:
            raise CheckpointError(
                f"{folder}: {len(lacking)} of {anatomy.num_experts.value} experts are missing from "
                f"{pattern.replace('-1', '*')!r}, first expert {min(lacking)}. Download the checkpoint again."
            )
        if max(experts) >= anatomy.num_experts.value:
            raise CheckpointError(
                f"{folder}: {pattern.replace('-1', '*')!r} has an expert {max(experts)}, but the config says "
                f"{anatomy.num_experts.value} experts."
            )
    # Several stored tensors may become one (gate and up projections), so that names alone do not show that one is gone.
    for name, tensor in anatomy.skeleton.state_dict().items():
        if name in anatomy.axes and elements[name] != tensor.numel():
            raise CheckpointError(
                f"{folder}: the stored tensors that become {name!r} have {elements[name]} elements, the model has "
                f"{tensor.numel()}. Download the checkpoint again."
            )


class _Renamer:
    """Stored key -> (name in the model, whether the key is one of many that become that tensor)."""

    def __init__(self, anatomy: Anatomy):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        model = anatomy.skeleton
        transforms = get_model_conversion_mapping(model)
        self.known = model.state_dict()
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix

    def __call__(self, key: str) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.known)
        if name not in self.known and key in self.known:
            return key, False  # the loader, too, leaves a key alone that already is a name of the model
        return name, pattern is not None and "*" in pattern
