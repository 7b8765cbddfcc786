"""Whether a checkpoint holds every tensor of the model, and every expert of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.anatomy.axes import tied_names
from moeprune.anatomy.companions import ExpertPart, check_companions
from moeprune.anatomy.quirks.two_towers import other_tower
from moeprune.anatomy.roles import OneExpert, Role, Towers
from moeprune.errors import CheckpointError

if TYPE_CHECKING:
    from moeprune.anatomy.anatomy import Anatomy
    from moeprune.anatomy.formats import StoredFormat
    from moeprune.checkpoint.header import TensorInfo


@dataclass
class Seen:
    """What of the model was found in a checkpoint.

    Attributes:
        folder: The checkpoint, for errors.
        quantised: The quantised format that it is stored in, if any.
        names: Tensors of the model.
        experts: Expert ids by (tensor of the model, stored pattern).
        elements: Stored elements by tensor of the model.
        forms: Dtype and shape of what is stored of a tensor of the model, as in ``experts``, with the last expert so.
        parts: Stored tensors of experts' weights.
    """

    folder: Path
    quantised: StoredFormat | None = None
    names: set[str] = field(default_factory=set)
    experts: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    elements: Counter[str] = field(default_factory=Counter)
    forms: dict[tuple[str, str], dict[tuple[str, tuple[int, ...]], int | None]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    parts: list[ExpertPart] = field(default_factory=list)

    def add(self, anatomy: Anatomy, name: str, key: str, info: TensorInfo, role: Role | None, *, part: str) -> None:
        """Note one stored tensor.

        Args:
            anatomy: The model.
            name: The tensor of the model that it becomes a part of.
            key: Its stored key; for a companion the key of the weight that it accompanies.
            info: Its header entry.
            role: Its role.
            part: ``weight``, or which companion of the weight it is.
        """
        twin = other_tower(name, anatomy)
        if isinstance(role, OneExpert):
            name = twin if twin and role.tower else name
            pattern = role.renumbered(key, -1)
            self.experts[name, pattern].add(role.expert)
            self.forms[name, pattern][info.dtype, info.shape] = role.expert
            weight = f"{pattern.replace('-1', '*', 1)}{f' (tower {role.tower})' if role.tower else ''}"
            self.parts.append(ExpertPart(weight, role.expert, part, info.dtype))
        elif role is not None and name in anatomy.axes:
            self.forms[name, key][info.dtype, info.shape] = None
            self.parts.append(ExpertPart(key, None, part, info.dtype))
        self.names.add(name)
        if isinstance(role, Towers) and twin:
            self.names.add(twin)
            self.elements[twin] += info.numel // 2
            self.elements[name] -= info.numel // 2
        if part == "weight":
            self.elements[name] += info.numel


def check_complete(anatomy: Anatomy, seen: Seen) -> None:
    """Refuse a checkpoint that lacks a part of the model.

    Raises:
        CheckpointError: What is missing.
    """
    _check_names(anatomy, seen)
    _check_experts(anatomy, seen)
    if seen.quantised:
        where = str(seen.folder)
        # A tensor of all experts that nothing accompanies is a router or a bias, which is not quantised.
        accompanied = {part.weight for part in seen.parts if part.part != "weight"}
        expert_weights = [part for part in seen.parts if part.expert is not None or part.weight in accompanied]
        check_companions(expert_weights, stored=seen.quantised, num_experts=anatomy.num_experts.value, where=where)
        return
    _check_forms(anatomy, seen)
    # Several stored tensors may become one (gate and up projections), so that names alone do not show that one is gone.
    state = anatomy.skeleton.state_dict()
    for names in tied_names(anatomy.skeleton):
        name = names[0]
        axis = anatomy.axes.get(name)
        if axis is None or (axis.extra and any(key == name for key, _ in seen.experts)):
            continue
        found = sum(seen.elements[one] for one in names)
        if found != state[name].numel():
            raise CheckpointError(
                f"{seen.folder}: the stored tensors that become {name!r} have {found} elements, the model has "
                f"{state[name].numel()}. Download the checkpoint again."
            )


def _check_forms(anatomy: Anatomy, seen: Seen) -> None:
    """Of an unquantised checkpoint: the experts of a layer are alike, and numbers where the model has numbers."""
    state = anatomy.skeleton.state_dict()
    for (name, pattern), forms in seen.forms.items():
        shown = pattern.replace("-1", "*", 1)
        shapes = {shape: expert for (_, shape), expert in forms.items()}
        if len(shapes) > 1:
            found = " and ".join(f"{list(shape)} (expert {expert})" for shape, expert in shapes.items())
            raise CheckpointError(f"{seen.folder}: {shown!r} is stored as {found}. Download the checkpoint again.")
        for dtype, _ in forms:
            if state[name].is_floating_point() and not dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"{seen.folder}: {shown!r} is stored as {dtype}, and config.json has no quantization_config that "
                    "says what that means. Download the checkpoint again."
                )


def _check_names(anatomy: Anatomy, seen: Seen) -> None:
    for names in tied_names(anatomy.skeleton):  # tied tensors share one stored copy
        if seen.names.isdisjoint(names):
            raise CheckpointError(
                f"{seen.folder}: no stored tensor for {min(names)!r} of the model. Download the checkpoint again."
            )


def _check_experts(anatomy: Anatomy, seen: Seen) -> None:
    count = anatomy.num_experts.value
    for (name, pattern), experts in seen.experts.items():
        shown = pattern.replace("-1", "*", 1)
        lacking = set(range(count)) - experts
        if name in anatomy.own:
            continue  # each has a name of its own, and all names were checked
        if lacking:
            raise CheckpointError(
                f"{seen.folder}: {len(lacking)} of {count} experts are missing from {shown!r}, first expert "
                f"{min(lacking)}. Download the checkpoint again."
            )
        extra = anatomy.axes[name].extra
        if max(experts) >= count + extra:
            raise CheckpointError(
                f"{seen.folder}: {shown!r} has an expert {max(experts)}, but the config says {count} experts."
            )
