"""Parameters and bytes of a model and of what a plan would leave of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.names import text_config_of
from moeprune.anatomy.parts import PARTS, QUANTISED_PARTS, PartFinder
from moeprune.anatomy.quirks.mtp import MtpLayers
from moeprune.anatomy.stored import model_names
from moeprune.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from moeprune.anatomy.quantization import Quantisation

MTP = "multi-token prediction"  # a part of the checkpoint that transformers' model does not have
INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})


@dataclass(frozen=True)
class ModelSizes:
    """Where a model's parameters are.

    Attributes:
        parameters: Number of parameters by part (:data:`PARTS`); tied ones are counted once.
        num_bytes: Stored bytes by part, and of :data:`MTP` layers if there are any; they follow from the config where
            no weights are at hand.
        dtypes: Stored bytes by dtype, most first; empty where no weights are at hand.
        mtp_parameters: Stored parameters of multi-token prediction layers, which are in no part and no total.
        expert_parameters: Parameters that belong to one expert or another: all that pruning experts can remove.
        expert_bytes: Stored bytes that do.
        num_experts: Routed experts a layer.
        top_k: Active experts a token.
        num_layers: Layers with experts.
    """

    parameters: dict[str, int]
    num_bytes: dict[str, int]
    dtypes: dict[str, int]
    mtp_parameters: int
    expert_parameters: int
    expert_bytes: int
    num_experts: int
    top_k: int
    num_layers: int

    @property
    def bytes_per_expert(self) -> int:
        """Stored bytes of one routed expert of one layer."""
        return self.num_bytes["routed experts"] // (self.num_experts * self.num_layers)

    def total(self, *, num_experts: int | None = None) -> int:
        """All parameters, if every layer kept ``num_experts`` experts; without multi-token prediction layers."""
        return sum(self.parameters.values()) - round(self.expert_parameters * self._dropped(num_experts))

    def stored(self, *, num_experts: int | None = None) -> int:
        """All stored bytes, if every layer kept ``num_experts`` experts."""
        return sum(self.num_bytes.values()) - round(self.expert_bytes * self._dropped(num_experts))

    def active(self, *, num_experts: int | None = None, top_k: int | None = None) -> int:
        """Parameters that take part in the forward pass of one token of text, embeddings and output head included."""
        routed = self.parameters["routed experts"]
        unused = routed * (1 - (top_k or self.top_k) / self.num_experts)
        dropped = (self.expert_parameters - routed) * self._dropped(num_experts)
        return round(sum(self.parameters.values()) - self.parameters["other modalities"] - unused - dropped)

    def _dropped(self, num_experts: int | None) -> float:
        return 1 - (num_experts or self.num_experts) / self.num_experts


def measure_sizes(
    anatomy: Anatomy,
    tensors: Mapping[str, TensorInfo] | None = None,
    *,
    quantisation: Quantisation | None = None,
    quantised: frozenset[str] = QUANTISED_PARTS,
) -> ModelSizes:
    """Count parameters and bytes by part. Reads no weight.

    Args:
        anatomy: The model.
        tensors: Its stored tensors, if there are any.
        quantisation: How the checkpoint is quantised, if it is.
        quantised: The parts of it that are; stored tensors say so themselves.
    """
    finder = PartFinder(anatomy)
    parameters: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    of_experts: Counter[str] = Counter()
    seen: set[int] = set()
    for name, tensor in anatomy.skeleton.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            part = finder.part_of(name)
            parameters[part] += tensor.numel()
            of_experts[part] += round(tensor.numel() * finder.experts_share(name))
        seen.add(id(tensor))
    if tensors is None:
        bits = dict.fromkeys(PARTS, _plain_bits(anatomy.config))
        if quantisation is not None and quantisation.bits is not None:
            bits |= dict.fromkeys(quantised, quantisation.bits)
        stored = _expected(parameters, of_experts, bits)
    else:
        stored = _measured(anatomy, tensors, finder, quantisation)
    return ModelSizes(
        parameters=dict(parameters),
        num_bytes=dict(stored.parts),
        dtypes=dict(stored.dtypes.most_common()),
        mtp_parameters=stored.mtp_parameters,
        expert_parameters=of_experts.total(),
        expert_bytes=stored.experts,
        num_experts=anatomy.num_experts.value,
        top_k=anatomy.top_k.value,
        num_layers=len(anatomy.layers),
    )


@dataclass
class _Stored:
    parts: Counter[str]
    dtypes: Counter[str] = field(default_factory=Counter)
    experts: int = 0
    mtp_parameters: int = 0


def _plain_bits(config: Any) -> int:
    dtype = getattr(config, "dtype", None) or getattr(text_config_of(config)[1], "dtype", None) or torch.bfloat16
    return 8 * (dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))).itemsize


def _expected(parameters: Counter[str], of_experts: Counter[str], bits: Mapping[str, int]) -> _Stored:
    """Bytes that follow from the config; scales of quantised weights are not counted."""
    return _Stored(
        Counter({part: number * bits[part] // 8 for part, number in parameters.items()}),
        experts=sum(number * bits[part] // 8 for part, number in of_experts.items()),
    )


def _measured(
    anatomy: Anatomy, tensors: Mapping[str, TensorInfo], finder: PartFinder, quantisation: Quantisation | None
) -> _Stored:
    """Bytes of the stored tensors."""
    format_, bits = (quantisation.stored, quantisation.bits) if quantisation else (None, None)
    names = model_names(anatomy, tensors, stored=format_)
    mtp = MtpLayers.find(anatomy, [key for key, name in names.items() if name not in finder.known], {}).keys
    found = _Stored(Counter(dict.fromkeys(PARTS, 0)))
    for key, name in names.items():
        info = tensors[key]
        found.parts[MTP if key in mtp else finder.part_of(name)] += info.num_bytes
        found.experts += round(
            info.num_bytes * finder.experts_share(finder.like_last_layer(name) if key in mtp else name)
        )
        found.dtypes[info.dtype] += info.num_bytes
        companion = format_.companion(key) if format_ else None
        if key in mtp and (companion is None or companion.holds_weight):
            found.mtp_parameters += 8 * info.num_bytes // bits if bits and info.dtype in INTEGERS else info.numel
    return found


@dataclass(frozen=True)
class PrunedSizes:
    """Bytes and parameters before and after pruning.

    Attributes:
        bytes_before: Stored bytes of the source.
        bytes_after: Stored bytes of the pruned checkpoint.
        parameters_before: Parameters of the source.
        parameters_after: Parameters of the pruned checkpoint.
        active_before: Parameters that one token uses, before.
        active_after: Parameters that one token uses, after.
    """

    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int


def pruned_sizes(sizes: ModelSizes, *, num_experts: int, top_k: int) -> PrunedSizes:
    """What a plan with these counts leaves."""
    return PrunedSizes(
        bytes_before=sizes.stored(),
        bytes_after=sizes.stored(num_experts=num_experts),
        parameters_before=sizes.total(),
        parameters_after=sizes.total(num_experts=num_experts),
        active_before=sizes.active(),
        active_after=sizes.active(num_experts=num_experts, top_k=top_k),
    )
