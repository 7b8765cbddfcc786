"""The plan as data: JSON that a person can read, diff and edit, with two consumers (apply and export)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from moeprune.errors import PlanError
from moeprune.facts import ModelFacts
from moeprune.files import read_json, sha256_json, write_text


class LayerPlan(BaseModel):
    """What happens to one layer.

    Attributes:
        layer: Path of the decoder layer.
        keep: Ids of the experts that stay, ascending. The first becomes expert 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    keep: tuple[StrictInt, ...] = Field(min_length=1)


class Plan(BaseModel):
    """Which experts of which layer stay, and how many are active.

    Attributes:
        format: Version of this file format.
        model: The model the plan is for, as it was before.
        num_experts: Experts a layer after pruning.
        top_k: Active experts a token after pruning.
        layers: One entry for each layer with experts, in order.
        n_group: 1 turns group-limited routing off: a token may then use any of the kept experts. None leaves the groups
            as they are.
        mtp: What becomes of multi-token prediction layers: pruned with the experts of the last layer, or left out.
        method: How the experts were chosen (score, ratio, domains, seed, hash of the statistics), for the record.
        warnings: What a user should know before trusting the result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: ModelFacts
    num_experts: StrictInt
    top_k: StrictInt
    layers: tuple[LayerPlan, ...]
    n_group: Literal[1] | None = None
    mtp: Literal["prune", "drop"] = "prune"
    method: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def keep(self) -> dict[str, tuple[int, ...]]:
        """Kept expert ids by layer path."""
        return {layer.layer: layer.keep for layer in self.layers}

    @property
    def num_groups(self) -> int:
        """Expert groups of the pruned model's routing; 1 where any experts may be combined."""
        return self.model.routing.n_group if self.n_group is None else self.n_group

    @property
    def sha256(self) -> str:
        """Hash of what the plan does, independent of its formatting."""
        return sha256_json(self.model_dump(mode="json"))

    def check(self, facts: ModelFacts | None = None) -> None:
        """Check the plan against itself and, if given, against a model.

        Args:
            facts: The model it is to be applied to.

        Raises:
            PlanError: What does not fit and what was expected.
        """
        if facts is not None:
            self._check_model(facts)
        n_group, topk_group = self.model.routing.n_group, self.model.routing.topk_group
        if not 1 <= n_group <= self.model.num_experts or self.model.num_experts % n_group:
            raise PlanError(f"the plan's model cannot have {self.model.num_experts} experts in {n_group} equal groups.")
        if not 1 <= topk_group <= n_group:
            raise PlanError(f"the plan's model cannot use {topk_group} of {n_group} expert groups.")
        if not self.layers or len(self.keep) != len(self.layers):
            raise PlanError("the plan must list every layer with experts once, and at least one.")
        if [layer.layer for layer in self.layers] != list(self.model.layers):
            raise PlanError(
                f"the plan lists layers {_short([layer.layer for layer in self.layers])}, "
                f"the model has experts in {_short(list(self.model.layers))}."
            )
        for layer in self.layers:
            self._check_layer(layer)
        check_sizes(self.model, num_experts=self.num_experts, top_k=self.top_k, n_group=self.n_group)

    def _check_model(self, facts: ModelFacts) -> None:
        if facts.fingerprint != self.model.fingerprint:
            raise PlanError(
                f"the plan was made for {self.model.name} ({self.model.fingerprint[:12]}), this is {facts.name} "
                f"({facts.fingerprint[:12]}): other weights or another config. Calibrate and plan for this model."
            )
        for what, planned, found in (
            ("model type", self.model.model_type, facts.model_type),
            ("expert layers", self.model.layers, facts.layers),
            ("experts a layer", self.model.num_experts, facts.num_experts),
            ("active experts", self.model.top_k, facts.top_k),
            ("a fixed top-k:", self.model.top_k_fixed, facts.top_k_fixed),
            ("expert groups", self.model.routing.n_group, facts.routing.n_group),
            ("usable expert groups", self.model.routing.topk_group, facts.routing.topk_group),
            ("a group score", self.model.routing.group_score, facts.routing.group_score),
        ):
            if planned != found:
                planned, found = (_short(value) if isinstance(value, tuple) else value for value in (planned, found))
                raise PlanError(f"the plan was made for a model with {what} {planned}, {facts.name} has {found}.")

    def _check_layer(self, layer: LayerPlan) -> None:
        if list(layer.keep) != sorted(set(layer.keep)):
            raise PlanError(f"{layer.layer}: kept expert ids must ascend without repetition, got {_short(layer.keep)}.")
        if layer.keep[0] < 0 or layer.keep[-1] >= self.model.num_experts:
            raise PlanError(
                f"{layer.layer}: expert {layer.keep[-1] if layer.keep[0] >= 0 else layer.keep[0]} does not exist, "
                f"the model has experts 0 to {self.model.num_experts - 1}."
            )
        if len(layer.keep) != self.num_experts:
            raise PlanError(
                f"{layer.layer}: keeps {len(layer.keep)} experts, the plan says {self.num_experts}. config.json "
                "has room for one number only, so every layer keeps the same."
            )
        n_group = self.num_groups
        size = self.model.num_experts // n_group
        per_group = [sum(expert // size == group for expert in layer.keep) for group in range(n_group)]
        if len(set(per_group)) > 1:
            raise PlanError(
                f"{layer.layer}: keeps {per_group} experts of its {n_group} groups; group-limited routing needs "
                "the same number from each. To choose across groups, plan with --no-groups."
            )

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one line a layer."""
        data = self.model_dump(mode="json")
        layers = ",\n    ".join(json.dumps(layer) for layer in data.pop("layers"))
        # The layers come last, so that the last placeholder is theirs and not a name that a user chose.
        before, _, after = json.dumps(data | {"layers": "@"}, indent=2, ensure_ascii=False).rpartition('"@"')
        write_text(path, f"{before}[\n    {layers}\n  ]{after}\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and check a plan.

        Raises:
            PlanError: If it is missing, not a plan, or contradicts itself.
        """
        if path.is_dir():
            raise PlanError(f"{path}: a folder, expected a plan (a JSON file).")
        if not path.is_file():
            raise PlanError(f"{path}: no such plan. `moeprune plan STATS --keep 0.75 --out {path}` makes one.")
        try:
            read_json(path, allow_nan=False)  # pydantic takes the last of two equal keys, and NaN
            plan = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))[:200] or "the file"
            raise PlanError(
                f"{path}: not a plan that this version of moeprune reads: {where}: {first['msg']}."
            ) from error
        except (ValueError, OSError) as error:
            raise PlanError(f"{path}: not a plan that this version of moeprune reads: the file: {error}.") from error
        plan.check()
        return plan


def num_to_keep(model: ModelFacts, *, keep: float, n_group: int | None = None) -> int:
    """Experts a layer that a share stands for, rounded to the nearest number that fits the groups.

    Args:
        model: The model before pruning.
        keep: Share of experts to keep, above 0 and at most 1.
        n_group: Expert groups of the pruned model; by default the model's.

    Raises:
        PlanError: If the share is out of range.
    """
    if not 0 < keep <= 1:
        raise PlanError(f"--keep {keep}: expected a share above 0 and at most 1. For a number, use --keep-experts.")
    n_group = n_group or model.routing.n_group
    return max(1, int(keep * model.num_experts / n_group + 0.5)) * n_group


def check_sizes(model: ModelFacts, *, num_experts: int, top_k: int, n_group: int | None = None) -> None:
    """Refuse counts with which the model cannot route.

    Args:
        model: The model before pruning.
        num_experts: Experts a layer to keep.
        top_k: Active experts a token.
        n_group: Expert groups of the pruned model; by default the model's.

    Raises:
        PlanError: If they are out of range, or impossible under group-limited routing (transformers does not check this
            and routes to scrambled groups on some token counts).
    """
    routing = model.routing
    if not 1 <= num_experts <= model.num_experts:
        raise PlanError(f"cannot keep {num_experts} experts a layer: {model.name} has {model.num_experts}.")
    if not 1 <= top_k <= model.top_k:
        raise PlanError(f"cannot use {top_k} active experts: expected 1 to {model.top_k}, the top-k of {model.name}.")
    if model.top_k_fixed and top_k != model.top_k:
        raise PlanError(
            f"cannot use {top_k} active experts: {model.model_type} uses {model.top_k} whatever its config says. Prune "
            "experts only."
        )
    if top_k > num_experts:
        raise PlanError(
            f"cannot route to {top_k} of {num_experts} experts. Keep at least {top_k}, or lower --top-k to "
            f"{num_experts}."
        )
    if (n_group or routing.n_group) > 1:
        _check_groups(model, num_experts=num_experts, top_k=top_k)


def _check_groups(model: ModelFacts, *, num_experts: int, top_k: int) -> None:
    routing = model.routing
    # A group is scored by the sum of its two best experts, or by its best one alone (DeepSeek-V2).
    least = (2 if routing.group_score == "top2" else 1) * routing.n_group
    per_group, rest = divmod(num_experts, routing.n_group)
    if rest:
        lower, upper = num_experts - rest, max(num_experts - rest + routing.n_group, least)
        raise PlanError(
            f"cannot keep {num_experts} experts a layer: {model.name} routes in {routing.n_group} groups of equal "
            f"size. Keep {f'{lower} or ' if lower >= least else ''}{upper}."
        )
    if num_experts < least:
        raise PlanError(
            f"cannot keep {num_experts} experts a layer: a group is scored by its two best experts, so each of the "
            f"{routing.n_group} groups needs 2. Keep at least {least}."
        )
    if routing.topk_group * per_group < top_k:
        raise PlanError(
            f"cannot route to {top_k} experts: a token may use {routing.topk_group} groups of {per_group} experts. "
            f"Keep at least {-(-top_k // routing.topk_group) * routing.n_group}, or lower --top-k to "
            f"{routing.topk_group * per_group}."
        )


def _short(items: Any) -> str:
    items = list(items)
    shown = ", ".join(str(item) for item in items[:4])
    return f"[{shown}{', ...' if len(items) > 4 else ''}] ({len(items)})"
