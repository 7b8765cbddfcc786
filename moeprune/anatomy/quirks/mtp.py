"""Multi-token prediction layers: stored with the model, not loaded by transformers' model class.

Their experts are built from the same config entry as those of the trunk, so that a checkpoint whose trunk is pruned and
whose MTP layers are not disagrees with its config: engines that use them for speculative decoding refuse it or read
past the end. They are pruned with the experts of the last trunk layer, or left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeprune.anatomy.axes import EXPERT_NUMBER
from moeprune.anatomy.companions import expert_dim
from moeprune.anatomy.names import NUM_MTP, find_field
from moeprune.anatomy.roles import AllExperts, OneExpert, Role
from moeprune.checkpoint.unloaded import LAYER, MTP, is_mtp
from moeprune.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from moeprune.anatomy.anatomy import Anatomy
    from moeprune.anatomy.formats import StoredFormat
    from moeprune.checkpoint.header import TensorInfo

LIKE_EXPERTS = re.compile(r"(?:^|\.)(?:experts|gate|router)\.")
# What the checkpoints of DeepSeek, GLM and Step have in a prediction layer and in no other.
PREDICTS = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head)\.")
WAY_OUT = "Leave these layers out with --mtp drop."


@dataclass(frozen=True)
class MtpLayers:
    """The tensors of a checkpoint that belong to MTP layers.

    Attributes:
        keys: Their stored keys.
        layer: The trunk layer whose kept experts are theirs.
        patterns: How the trunk stores experts and routers below its decoder layers, with the role of each.
    """

    keys: frozenset[str]
    layer: str
    patterns: Mapping[str, Role]

    @classmethod
    def find(cls, anatomy: Anatomy, unknown: Iterable[str], trunk: Mapping[str, Role]) -> MtpLayers:
        """Tell MTP layers among the keys that are not tensors of the model.

        Args:
            anatomy: The model.
            unknown: Stored keys that are no tensors of the model.
            trunk: Roles of those that are.

        Raises:
            CheckpointError: If there are layers beyond the last one that do not look like prediction layers.
        """
        num_layers = getattr(anatomy.text_config, "num_hidden_layers", None)
        keys = frozenset(key for key in unknown if is_mtp(key, num_layers))
        _check_declared(anatomy, keys)
        patterns: dict[str, Role] = {}
        for key, role in trunk.items() if keys else ():
            below = LAYER.search(key)
            if below is not None:
                patterns[_starred(key[below.end() :])] = role
        return cls(keys, anatomy.layers[-1].name, patterns)

    def roles(
        self, tensors: Mapping[str, TensorInfo], *, num_experts: int, stored: StoredFormat | None
    ) -> dict[str, Role]:
        """The role of every MTP tensor that depends on the experts.

        Args:
            tensors: All stored tensors.
            num_experts: Experts a layer before pruning.
            stored: The quantised format, if any.

        Raises:
            CheckpointError: If experts are missing.
            UnsupportedModelError: If a tensor looks as if it held experts in a way that the trunk does not show.
        """
        found: dict[str, Role] = {}
        numbers: dict[str, set[int]] = defaultdict(set)
        for key in self.keys:
            role = self._role(key, tensors[key], num_experts, stored)
            if role is not None:
                found[key] = role
            if isinstance(role, OneExpert):
                numbers[role.renumbered(key, -1)].add(role.expert)
        for pattern, experts in numbers.items():
            if experts != set(range(num_experts)):
                raise CheckpointError(
                    f"the multi-token prediction layers have experts {min(experts)} to {max(experts)} of "
                    f"{pattern.replace('-1', '*', 1)!r} ({len(experts)}), the config says {num_experts}. {WAY_OUT}"
                )
        return found

    def _role(self, key: str, info: TensorInfo, num_experts: int, stored: StoredFormat | None) -> Role | None:
        number = EXPERT_NUMBER.search(key)
        if number is not None:
            return OneExpert(self.layer, int(number.group(1)), *number.span(1))
        like = self._trunk_role(key)
        if isinstance(like, AllExperts) and info.shape[like.dim] == num_experts * like.rows + like.extra:
            return AllExperts(self.layer, like.dim, like.rows, like.extra)
        companion = stored.companion(key) if stored else None
        if companion is not None and isinstance(self._trunk_role(companion.base), AllExperts):
            dim = expert_dim(key, shape=info.shape, companion=companion, num_experts=num_experts)
            return None if dim is None else AllExperts(self.layer, dim)
        if like is None and not (LIKE_EXPERTS.search(key) and num_experts in info.shape):
            return None
        raise UnsupportedModelError(
            f"{info.file.parent}: {key!r}, {list(info.shape)}, of a multi-token prediction layer may hold experts, and "
            f"nothing in the trunk says how. {WAY_OUT}"
        )

    def _trunk_role(self, key: str) -> Role | None:
        ending = _starred(key)
        return next((role for pattern, role in self.patterns.items() if ending.endswith(f".{pattern}")), None)


def _check_declared(anatomy: Anatomy, keys: Iterable[str]) -> None:
    """Refuse decoder layers that are taken for prediction layers only because config.json says fewer than there are."""
    behind = {key: int(layer.group(1)) for key in keys if not MTP.search(key) and (layer := LAYER.search(key))}
    predict = {layer for key, layer in behind.items() if PREDICTS.search(key)}
    field = find_field(anatomy.config, NUM_MTP)
    if len({*behind.values()}) > max(len(predict), field.value if field else 0):
        layer = min({*behind.values()} - predict)
        raise CheckpointError(
            f"the checkpoint has a layer {layer}, the config says num_hidden_layers = "
            f"{anatomy.text_config.num_hidden_layers}. Is config.json that of another model?"
        )


def _starred(key: str) -> str:
    return EXPERT_NUMBER.sub("*", key)
