"""Where a model keeps its routers and experts, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.names import ConfigField, text_config_of
from moeprune.facts import ModelFacts, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ExpertAxis:
    """A tensor in memory with one slice for each expert.

    Attributes:
        name: Its name in the state dict.
        layer: The expert layer it belongs to (:attr:`MoeLayer.name`).
        dim: The axis that counts experts.
        rows: Entries along the axis for each expert.
        extra: Entries after those of the experts, which pruning leaves alone (shared experts' router rows).
    """

    name: str
    layer: str
    dim: int
    rows: int = 1
    extra: int = 0


@dataclass(frozen=True, slots=True)
class OwnTensor:
    """A tensor in memory of one expert that is a module of its own. ``name[start:stop]`` is its number."""

    name: str
    layer: str
    expert: int
    start: int
    stop: int

    def renumbered(self, expert: int) -> str:
        """The name with another expert number."""
        return f"{self.name[: self.start]}{expert}{self.name[self.stop :]}"


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A router and its experts.

    Attributes:
        name: Path of the decoder layer that holds them (``model.layers.3``); where one decoder layer holds several
            sets of experts, the path of the module that holds this one.
        experts: Path of the module that holds all experts; its call receives hidden states, selection and weights.
        router: Path of the module that chooses experts.
    """

    name: str
    experts: str
    router: str


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its routers and experts.

    Attributes:
        config: The model's config.
        skeleton: The model on the meta device.
        num_experts: The config field with the number of routed experts a layer.
        top_k: The config field with the number of experts a token uses.
        layers: The sets of experts, in the order of the model.
        axes: Every tensor with an expert axis, by name.
        own: Every tensor of experts that are modules of their own, by name.
        expert_ids: Tensors whose values are expert ids (deepseek_v4's ``tid2eid``), with their layer.
        routing: How the router works.
    """

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    num_experts: ConfigField
    top_k: ConfigField
    layers: tuple[MoeLayer, ...]
    axes: dict[str, ExpertAxis]
    routing: Routing
    own: dict[str, OwnTensor] = field(default_factory=dict)
    expert_ids: dict[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: the number of token ids that the model takes."""
        try:
            embedding: Any = self.skeleton.get_input_embeddings()
        except NotImplementedError:  # several models in one (Qwen3-Omni)
            return int(self.text_config.vocab_size)
        return int(embedding.weight.shape[0])

    @property
    def text_config(self) -> Any:
        """The config of the language model: the model's own, or a part of it in multimodal ones."""
        return text_config_of(self.config)[1]

    @property
    def context(self) -> int | None:
        """Longest input in tokens, if the config says."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def facts(self, *, name: str, fingerprint: str) -> ModelFacts:
        """What stats and plans carry of this anatomy."""
        return ModelFacts(
            name=name,
            model_type=self.config.model_type,
            fingerprint=fingerprint,
            layers=tuple(layer.name for layer in self.layers),
            num_experts=self.num_experts.value,
            top_k=self.top_k.value,
            top_k_fixed=self.top_k.fixed,
            routing=self.routing,
        )


def kept_runs(keep: Sequence[int], *, num_experts: int, rows: int = 1, extra: int = 0) -> list[tuple[int, int]]:
    """The entries of an expert axis that stay, as runs ``start`` to ``stop`` of neighbours.

    Args:
        keep: Kept expert ids, ascending.
        num_experts: Experts before pruning.
        rows: Entries for each expert.
        extra: Entries after those of the experts; they stay.

    Example:
        ``kept_runs([0, 1, 4], num_experts=6)`` is ``[(0, 2), (4, 5)]``.
    """
    spans = [(expert * rows, (expert + 1) * rows) for expert in keep]
    if extra:
        spans.append((num_experts * rows, num_experts * rows + extra))
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return runs
