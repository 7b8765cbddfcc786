"""What the rules look at: the counts of a model as an engine would read them. None stands for "not known"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moeprune.anatomy.names import N_GROUP, NUM_EXPERTS, TOP_K
from moeprune.deploy.quantisation import Quantisation, read_quantisation
from moeprune.errors import UnsupportedModelError
from moeprune.facts import ModelFacts

WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class DeployFacts:
    """A model to be served.

    Attributes:
        model_type: ``model_type`` of its language model.
        num_experts: Routed experts a layer.
        top_k: Active experts a token.
        n_group: Expert groups as config.json says, 1 where it says nothing.
        topk_group: Groups a token may use.
        group_score: What transformers ranks groups by: ``"top2"`` or ``"max"``.
        scoring: ``"softmax"``, ``"sigmoid"`` ...
        renormalised: Whether the top-k weights are divided by their sum.
        bias: ``"none"``, ``"router"`` or ``"correction"``.
        expert_width: Intermediate size of an expert.
        shared_experts: Number of shared experts, 0 if none.
        quantisation: How the experts are stored.
        config: The part of config.json that describes the language model; None if only a plan is known.
        most: The largest number of experts that may be advised; that of the model before pruning, if known.
    """

    model_type: str
    num_experts: int
    top_k: int | None
    n_group: int
    topk_group: int
    group_score: str | None = None
    scoring: str | None = None
    renormalised: bool | None = None
    bias: str | None = None
    expert_width: int | None = None
    shared_experts: int | None = None
    quantisation: Quantisation | None = None
    config: dict[str, Any] | None = None
    most: int | None = None

    def pruned(self, *, num_experts: int, top_k: int, n_group: int | None = None) -> DeployFacts:
        """The model that a plan with these numbers leaves; ``n_group`` is 1 where it turns groups off."""
        fewer = self.with_experts(num_experts)
        groups = {} if n_group is None else {"n_group": n_group, "topk_group": n_group}
        config = fewer.config
        if config is not None:
            config = config | {name: top_k for name in TOP_K if config.get(name) == self.top_k}
            config |= {name: 1 for name in (*N_GROUP, "topk_group") if groups and name in config}
            if groups and config.get("topk_method") == "group_limited_greedy":
                config["topk_method"] = "greedy"
        return replace(fewer, top_k=top_k, config=config, **groups)

    def with_experts(self, num_experts: int) -> DeployFacts:
        """The same model with another number of experts."""
        config = self.config
        if config is not None:
            config = config | {name: num_experts for name in NUM_EXPERTS if config.get(name) == self.num_experts}
        return replace(self, num_experts=num_experts, config=config)


def facts_of_model(
    model: ModelFacts, *, num_experts: int | None = None, top_k: int | None = None, n_group: int | None = None
) -> DeployFacts:
    """What is known without config.json.

    Args:
        model: The model before pruning.
        num_experts: Experts a layer after pruning; by default the model's.
        top_k: Active experts a token after pruning; by default the model's.
        n_group: 1 where a plan turns groups off; None leaves them.
    """
    routing = model.routing
    return DeployFacts(
        model_type=model.model_type,
        num_experts=model.num_experts if num_experts is None else num_experts,
        top_k=model.top_k if top_k is None else top_k,
        n_group=n_group or routing.n_group,
        topk_group=n_group or routing.topk_group,
        most=model.num_experts,
        **_routing(model),
    )


def facts_of_config(raw: dict[str, Any], *, model: ModelFacts | None = None, most: int | None = None) -> DeployFacts:
    """What config.json says, and what ``model`` adds about its router.

    Args:
        raw: config.json.
        model: How the model routes, if that is known; its counts are not used.
        most: The largest number of experts that may be advised.

    Raises:
        UnsupportedModelError: If there is no number of experts in it.
    """
    config = next((part for part in _parts(raw) if _number(part, NUM_EXPERTS) is not None), None)
    if config is None:
        # A list instead of a number is a finding, not a model without experts.
        config = next((part for part in _parts(raw) if any(part.get(name) for name in NUM_EXPERTS)), None)
    if config is None:
        raise UnsupportedModelError(f"config.json: no number of experts (looked for {', '.join(NUM_EXPERTS)}).")
    inherited = {"model_type": raw.get("model_type", "unknown"), "architectures": raw.get("architectures")}
    config = inherited | {key: value for key, value in config.items() if value is not None or key not in inherited}
    known = _routing(model) if model is not None else _routing_of_config(config)
    n_group = _number(config, N_GROUP) or (model.routing.n_group if model is not None else 1)
    return DeployFacts(
        model_type=str(config["model_type"]),
        num_experts=_number(config, NUM_EXPERTS) or _largest(config, NUM_EXPERTS),
        top_k=_number(config, TOP_K),
        n_group=n_group,
        topk_group=_number(config, ("topk_group",)) or n_group,
        expert_width=_number(config, tuple(name for name in WIDTHS if name in config)[:1]),
        shared_experts=_number(config, SHARED) or 0,
        quantisation=read_quantisation(config.get("quantization_config") or raw.get("quantization_config")),
        config=config,
        most=most,
        **known,
    )


def _routing(model: ModelFacts) -> dict[str, Any]:
    routing = model.routing
    return {
        "group_score": routing.group_score,
        "scoring": None if routing.scoring == "unknown" else routing.scoring,
        "renormalised": routing.renormalised,
        "bias": routing.bias,
    }


def _routing_of_config(config: dict[str, Any]) -> dict[str, Any]:
    method = config.get("topk_method")
    return {
        "group_score": {"group_limited_greedy": "max", "noaux_tc": "top2"}.get(method or ""),
        "scoring": config["scoring_func"] if config.get("scoring_func") in SCORINGS else None,
        "renormalised": config.get("norm_topk_prob"),
        "bias": "correction" if method == "noaux_tc" else None,
    }


def _parts(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """config.json and the configs inside it, outermost first."""
    yield raw
    for value in raw.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # the same for every layer (Hunyuan)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _largest(config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The largest of the numbers that lists give, 1 if there are none."""
    lists = [config[name] for name in names if isinstance(config.get(name), list)]
    return max([value for values in lists for value in values if isinstance(value, int)], default=1)
