"""What each tensor of a model is a part of: experts, router, attention, embeddings and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.axes import decoder_layer_of
from moeprune.anatomy.names import text_config_of

PARTS: tuple[str, ...] = (
    "routed experts",
    "router",
    "shared experts",
    "attention",
    "embeddings",
    "output head",
    "other modalities",
    "everything else",
)
# Where quantisers work unless told otherwise; they leave routers, embeddings and output heads as they are.
QUANTISED_PARTS = frozenset({"routed experts", "shared experts", "attention", "everything else"})


class PartFinder:
    """Says which part each tensor of a model belongs to.

    Args:
        anatomy: The model.
    """

    def __init__(self, anatomy: Anatomy):
        model = anatomy.skeleton
        self.known = model.state_dict()
        self._anatomy = anatomy
        self._experts = tuple(f"{layer.experts}." for layer in anatomy.layers)
        self._routers = tuple(f"{layer.router}." for layer in anatomy.layers)
        self._text = _text_tower(anatomy)
        inputs, head = _tables(model)
        paths = {id(module): f"{path}." for path, module in model.named_modules()}
        self._tables = {paths[m]: part for m, part in ((head, "output head"), (inputs, "embeddings")) if m in paths}

    def part_of(self, name: str) -> str:
        """One of :data:`PARTS`, by the name of a tensor in the model or of one that is stored beside it."""
        if name in self._anatomy.own or name.startswith(self._experts):
            return "routed experts"
        if name.startswith(self._routers) or name in self._anatomy.axes:
            return "router"
        for path, part in self._tables.items():
            if name.startswith(path):
                return part
        if not name.startswith(self._text):
            return "other modalities"
        if "shared" in name:
            return "shared experts"
        return "attention" if "attn" in name or "attention" in name else "everything else"

    def experts_share(self, name: str) -> float:
        """Which share of a tensor belongs to one expert or another: 1, 0, or between where an axis has other rows."""
        axis = self._anatomy.axes.get(name)
        if axis is not None:
            rows = axis.rows * self._anatomy.num_experts.value
            return rows / (rows + axis.extra)
        return float(name in self._anatomy.own)

    def like_last_layer(self, name: str) -> str:
        """The tensor of the last layer with experts that a tensor of a multi-token prediction layer is a copy of."""
        last = f"{self._anatomy.layers[-1].name}."
        copies = (own for own in self.known if own.startswith(last) and name.endswith(own[len(last) - 1 :]))
        return next(copies, name)


def quantised_parts(entry: Mapping[str, Any]) -> frozenset[str]:
    """The parts that a ``quantization_config`` says are quantised: all but those whose modules it excludes by name."""
    excluded = " ".join(
        str(entry.get(key)) for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
    )
    words = {"attention": "attn", "shared experts": "shared_expert"}
    return QUANTISED_PARTS - {part for part, word in words.items() if word in excluded}


def dense_layers(anatomy: Anatomy) -> list[str]:
    """The decoder layers without experts, beside those with experts, in the order of the model."""
    model = anatomy.skeleton
    sparse = {decoder_layer_of(model, f"{layer.router}.") for layer in anatomy.layers}
    stacks = dict.fromkeys(name.rpartition(".")[0] for name in sparse)
    names = [f"{stack}.{i}" for stack in stacks for i, _ in enumerate(model.get_submodule(stack).children())]
    return [name for name in names if name not in sparse]


def _text_tower(anatomy: Anatomy) -> str:
    """The path of the language model inside a multimodal one, with a dot at its end; ``""`` if it is all of it."""
    path, text = text_config_of(anatomy.config)
    router = anatomy.layers[0].router
    for name, module in anatomy.skeleton.named_modules() if path else ():
        if type(getattr(module, "config", None)) is type(text) and router.startswith(f"{name}."):
            return f"{name}."
    return ""


def _tables(model: Any) -> tuple[int, int]:
    """Identities of the input embedding and the output head."""
    try:
        return id(model.get_input_embeddings()), id(model.get_output_embeddings())
    except NotImplementedError:  # several models in one (Qwen3-Omni): the first reads text
        inner = next(iter(model.children()))
        return id(inner.get_input_embeddings()), id(inner.get_output_embeddings())
