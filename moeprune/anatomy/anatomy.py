"""Where a model keeps its routers and experts, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.names import ConfigField
from moeprune.facts import ModelFacts, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ExpertAxis:
    """A tensor in memory with one slice for each expert.

    Attributes:
        name: Its name in the state dict.
        layer: The decoder layer that holds it.
        dim: The axis that counts experts.
    """

    name: str
    layer: str
    dim: int


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """A decoder layer with experts.

    Attributes:
        name: Path of the decoder layer (``model.layers.3``).
        experts: Path of the module whose call receives hidden states, selection and weights.
        router: Path of the module that owns the router's weight.
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
        layers: The decoder layers with experts, in order.
        axes: Every tensor with an expert axis, by name.
        routing: How the router works.
    """

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    num_experts: ConfigField
    top_k: ConfigField
    layers: tuple[MoeLayer, ...]
    axes: dict[str, ExpertAxis]
    routing: Routing

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: the number of token ids that the model takes."""
        embedding: Any = self.skeleton.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def context(self) -> int | None:
        """Longest input in tokens, if the config says."""
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def facts(self, *, name: str, fingerprint: str) -> ModelFacts:
        """What stats and plans carry of this anatomy."""
        return ModelFacts(
            name=name,
            model_type=self.config.model_type,
            fingerprint=fingerprint,
            layers=tuple(layer.name for layer in self.layers),
            num_experts=self.num_experts.value,
            top_k=self.top_k.value,
            routing=self.routing,
        )
