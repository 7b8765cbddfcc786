"""Map the tensors of a checkpoint to the experts they hold.

A checkpoint may store each expert by itself (``experts.7.up_proj.weight``) or all experts of a layer in one tensor,
under the names of any era, quantised or not; transformers' own key mapping says which tensor of the model a stored key
becomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeprune.anatomy.anatomy import Anatomy, ExpertAxis
from moeprune.anatomy.axes import EXPERT_NUMBER
from moeprune.anatomy.companions import ExpertPart, expert_dim
from moeprune.anatomy.complete import Seen, check_complete
from moeprune.anatomy.formats import FORMATS
from moeprune.anatomy.quirks.mtp import MtpLayers
from moeprune.anatomy.quirks.two_towers import other_tower
from moeprune.anatomy.renamer import Renamed, Renamer, in_loading_order
from moeprune.anatomy.roles import AllExperts, ExpertIds, OneExpert, Role, Towers
from moeprune.checkpoint.header import TensorInfo
from moeprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moeprune.anatomy.formats import StoredFormat

ROUTED_EXPERTS = re.compile(r"(?:^|\.)experts?\.")


@dataclass
class StoredMap:
    """What the stored tensors of a checkpoint are.

    Attributes:
        roles: Those that depend on the experts; all others are to be kept as they are.
        mtp: Those of multi-token prediction layers, with experts or not.
    """

    roles: dict[str, Role] = field(default_factory=dict)
    mtp: frozenset[str] = frozenset()


def map_stored(anatomy: Anatomy, tensors: Mapping[str, TensorInfo], *, stored: StoredFormat | None = None) -> StoredMap:
    """Say what every stored tensor is.

    Args:
        anatomy: The model.
        tensors: The tensors of a checkpoint, by stored key.
        stored: The quantised format that it is stored in, if any.

    Raises:
        CheckpointError: If experts or other tensors of the model are missing from the checkpoint.
        UnsupportedModelError: If the checkpoint holds experts that the model does not have, or stores an expert axis in
            another way than the model.
    """
    return _Mapper(anatomy, tensors, stored).map()


def model_names(
    anatomy: Anatomy, tensors: Mapping[str, TensorInfo], *, stored: StoredFormat | None = None
) -> dict[str, str]:
    """The tensor of the model that each stored tensor becomes, becomes a part of, or accompanies."""
    rename = Renamer(anatomy)
    names = {}
    for key in in_loading_order(tensors):
        name = rename(key).name
        companion = stored.companion(key) if stored and name not in rename.known else None
        names[key] = rename(companion.base).name if companion else name
    return names


class _Mapper:
    def __init__(self, anatomy: Anatomy, tensors: Mapping[str, TensorInfo], stored: StoredFormat | None):
        self.anatomy, self.tensors, self.stored = anatomy, tensors, stored
        self.rename = Renamer(anatomy)
        self.num_experts = anatomy.num_experts.value
        self.seen = Seen(next(iter(tensors.values())).file.parent, quantised=stored)
        self.roles: dict[str, Role] = {}

    def map(self) -> StoredMap:
        unknown = [key for key in in_loading_order(self.tensors) if not self._map_known(key)]
        mtp = MtpLayers.find(self.anatomy, unknown, self.roles)
        for key in unknown:
            if key in mtp.keys:
                continue
            if ROUTED_EXPERTS.search(key):
                raise UnsupportedModelError(
                    f"{self.tensors[key].file.parent}: {key!r} belongs to experts that transformers does not load. "
                    f"{self._way_out(key)}"
                )
        self.roles |= mtp.roles(self.tensors, num_experts=self.num_experts, stored=self.stored)
        check_complete(self.anatomy, self.seen)
        return StoredMap({key: self.roles[key] for key in self.tensors if key in self.roles}, frozenset(mtp.keys))

    def _way_out(self, key: str) -> str:
        formats = [stored.name for stored in FORMATS.values() if stored.companion(key)]
        if self.stored is None and formats:
            return f"If it is quantised ({' or '.join(formats)}), config.json must have the quantization_config."
        return "Pruning such checkpoints is not supported."

    def _map_known(self, key: str) -> bool:
        """Note the role of a tensor of the model, a part of one or its companion; False if the key is none of them."""
        renamed = self.rename(key)
        info = self.tensors[key]
        if renamed.name in self.rename.known:
            self._note(key, info, renamed)
            return True
        companion = self.stored.companion(key) if self.stored else None
        if companion is None:
            return False
        renamed = self.rename(companion.base)
        if renamed.name not in self.rename.known:
            return False
        self._note_companion(key, info, renamed, companion)
        return True

    def _note(self, key: str, info: TensorInfo, renamed: Renamed) -> None:
        name = renamed.name
        own, axis = self.anatomy.own.get(name), self.anatomy.axes.get(name)
        role: Role | None = None
        if own is not None:
            role = self._one_expert(key, name, own.layer, own.expert)
        elif name in self.anatomy.expert_ids:
            role = ExpertIds(self.anatomy.expert_ids[name])
        elif axis is not None and renamed.one_of_many and EXPERT_NUMBER.search(key):
            role = self._one_expert(key, name, axis.layer)
        elif axis is not None:
            role = self._all_experts(info, axis, renamed)
        self.seen.add(self.anatomy, name, key, info, role, part="weight")
        self.seen.names.update(renamed.others)
        if role is not None:
            self.roles[key] = role

    def _one_expert(self, key: str, name: str, layer: str, expert: int | None = None) -> OneExpert:
        number = EXPERT_NUMBER.search(key)
        assert number is not None, f"{key!r} has no expert number"
        expert = int(number.group(1)) if expert is None else expert
        vision = other_tower(name, self.anatomy)
        if vision is not None and expert >= self.num_experts:
            return OneExpert(self.anatomy.axes[vision].layer, expert - self.num_experts, *number.span(1), tower=1)
        return OneExpert(layer, expert, *number.span(1))

    def _all_experts(self, info: TensorInfo, axis: ExpertAxis, renamed: Renamed) -> Role:
        in_memory = tuple(self.rename.known[axis.name].shape)
        vision = other_tower(axis.name, self.anatomy)
        if vision is not None and info.shape == (2, *in_memory[1:]):
            return Towers((axis.layer, self.anatomy.axes[vision].layer), axis.dim)
        dim = axis.dim
        if renamed.swapped and dim in renamed.swapped:
            dim = renamed.swapped[1 - renamed.swapped.index(dim)]
        if len(info.shape) != len(in_memory) or info.shape[dim] != in_memory[axis.dim]:
            raise UnsupportedModelError(
                f"{info.file}: {info.name!r} is stored as {list(info.shape)}, the model has {list(in_memory)} with the "
                f"experts on axis {axis.dim}. Either config.json is of another model, or the layout is not supported."
            )
        return AllExperts(axis.layer, dim, axis.rows, axis.extra)

    def _note_companion(self, key: str, info: TensorInfo, renamed: Renamed, companion) -> None:
        name = renamed.name
        axis, own = self.anatomy.axes.get(name), self.anatomy.own.get(name)
        role: Role | None = None
        if own is not None:
            role = self._one_expert(key, name, own.layer, own.expert)
        elif axis is not None and renamed.one_of_many and EXPERT_NUMBER.search(key):
            role = self._one_expert(key, name, axis.layer)
        elif axis is not None:
            dim = expert_dim(key, shape=info.shape, companion=companion, num_experts=self.num_experts)
            role = None if dim is None else AllExperts(axis.layer, dim)
        self.seen.add(self.anatomy, name, companion.base, info, role, part=companion.part)
        if role is not None:
            self.roles[key] = role


__all__ = ["AllExperts", "ExpertPart", "OneExpert", "Role", "StoredMap", "map_stored", "model_names"]
