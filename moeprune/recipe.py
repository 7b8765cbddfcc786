"""The recipe: what a run does. Reproducible, printed into the report, and strict; imports no torch.

How a run does it (device, quietness, folder) is not part of the recipe but an option of the command.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moeprune.calibrate.quantities import LEVELS
from moeprune.data_spec import DataSpec
from moeprune.deploy.serving import Serving
from moeprune.errors import DeployError, RecipeError, did_you_mean
from moeprune.score import SCORES


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _as_deployments(value: Any) -> Any:
    return [{"engine": item} if isinstance(item, str) else item for item in _as_list(value)]


def _known_score(name: str) -> str:
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}. {did_you_mean(name, SCORES)}")
    return name


ScoreName = Annotated[str, AfterValidator(_known_score)]
Share = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)


class Calibration(_Section):
    """Text and how much of it.

    Attributes:
        data: Named domains, or the source of each alone: a file, a Hub id, a mix, or ``demo`` for the calibration text
            of the embedded model.
        self_generate: Prompts, given like data. The model's own answers to them are calibration text, too.
        max_new_tokens: Longest of these answers.
        tokens: Token budget of each domain that has none of its own.
        length: Tokens a row, not more than the model's context.
        batch_size: Rows a forward pass.
        seed: Order of the documents.
        packing: How documents become rows: several that do not see each other (``isolate``), one a row (``pad``), end
            to end (``concat``), or the first of these that the model can (``auto``).
        statistics: What is summed; each level holds those before it. ``moeprune ls scores`` says which a score needs.
        until_stable: Stop as soon as the split-half reliability of ``stable_score`` reaches this value.
        stable_score: The score that is looked at.
    """

    data: Annotated[tuple[DataSpec, ...], BeforeValidator(_as_list)] = ()
    self_generate: Annotated[tuple[DataSpec, ...], BeforeValidator(_as_list)] = ()
    max_new_tokens: int = Field(default=1_024, gt=0)
    tokens: int = Field(default=65_536, gt=0)
    length: int = Field(default=2_048, gt=1)
    batch_size: int = Field(default=8, gt=0)
    seed: int = 0
    packing: Literal["auto", "isolate", "pad", "concat"] = "auto"
    statistics: Literal["standard", "merge", "full"] = "standard"
    until_stable: float | None = Field(default=None, gt=0, lt=1)
    stable_score: ScoreName = "reap"

    @model_validator(mode="before")
    @classmethod
    def _plain_text_is_a_source(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return values | {
            key: [{"source": item} if isinstance(item, str) else item for item in _as_list(values[key])]
            for key in ("data", "self_generate")
            if key in values
        }

    @model_validator(mode="after")
    def _there_is_text(self) -> Calibration:
        if not self.data and not self.self_generate:
            raise ValueError("no calibration text; give data (a file, a Hub id, a mix or demo) or self_generate")
        return self


class Variant(_Section):
    """One pruned model, or several: every list is crossed with the others.

    Attributes:
        name: Its name in tables and folders; made from the settings where it is missing.
        score: Saliency criterion (``moeprune ls scores``).
        keep: Share of experts to keep.
        keep_experts: Number of experts a layer to keep, instead of ``keep``.
        top_k: Active experts a token; by default the model's own.
        groups: Whether group-limited routing stays, where the model has it.
        mtp: Multi-token prediction layers: pruned like the last layer (``prune``), or left out (``drop``).
        domains: Share of each calibration domain in the saliency; by default as much as was calibrated on it.
        seed: For criteria that draw random numbers.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    score: Annotated[tuple[ScoreName, ...], Field(min_length=1), BeforeValidator(_as_list)] = ("reap",)
    keep: Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_as_list)] = (1.0,)
    keep_experts: int | None = Field(default=None, gt=0)
    top_k: Annotated[tuple[TopK | None, ...], Field(min_length=1), BeforeValidator(_as_list)] = (None,)
    groups: bool = True
    mtp: Literal["prune", "drop"] = "prune"
    domains: dict[str, Annotated[float, Field(ge=0)]] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Variant:
        if self.keep_experts is not None and "keep" in self.model_fields_set:
            raise ValueError("give keep or keep_experts, not both")
        if self.name and len(self.score) * len(self.keep) * len(self.top_k) > 1:
            raise ValueError(f"the name {self.name!r} stands for several variants; leave it out to have them named")
        for name in self.score:
            if self.domains is not None and not SCORES.get(name).by_domain:
                raise ValueError(f"the score {name!r} cannot be told by domain; leave domains out")
        return self


class PlanSettings(_Section):
    """One variant with every list resolved: the arguments of :func:`moeprune.plan.uniform.make_plan`."""

    name: str
    score: str
    keep: float | None
    keep_experts: int | None
    top_k: int | None
    groups: bool
    mtp: Literal["prune", "drop"]
    domains: dict[str, float] | None
    seed: int

    @property
    def prunes(self) -> bool:
        """Whether experts are dropped (or only the top-k lowered)."""
        return self.keep_experts is not None or (self.keep or 1.0) < 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``make_plan``."""
        return self.model_dump(exclude={"name"})

    @property
    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of :func:`moeprune.plan.uniform.choose_sizes`."""
        return self.model_dump(include={"keep", "keep_experts", "top_k", "groups"})


class Deployment(_Section):
    """An engine that is to serve the pruned models (:class:`moeprune.deploy.serving.Serving`).

    Attributes:
        engine: ``vllm``, ``sglang``, ``llama.cpp`` or ``transformers``.
        tp: Tensor-parallel size.
        ep: Expert-parallel size; for vLLM tensor- times data-parallel size.
        redundant: Copies of experts on top of the model's own.
        gpu: Which GPU, such as ``h200``: of some it is known which numbers have tuned kernels.
    """

    engine: str
    tp: int = 1
    ep: int = 1
    redundant: int = 0
    gpu: str | None = None

    @model_validator(mode="after")
    def _is_known(self) -> Deployment:
        try:
            _ = self.serving
        except DeployError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def serving(self) -> Serving:
        """The same, checked."""
        return Serving(**self.model_dump())


class Evaluation(_Section):
    """lm-eval tasks that every variant is measured on.

    Attributes:
        tasks: Names of tasks or groups (``moeprune ls tasks``).
        include: Folder with task files; by default the offline tasks that ship with moeprune.
        limit: Items of each task; all of them where missing.
        batch_size: Sequences a forward pass.
        seed: Seed of lm-eval.
    """

    tasks: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    include: Path | None = None
    limit: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    seed: int = 0


class Throughput(_Section):
    """Plain transformers speed: all variants are held in memory at once and timed in turn.

    Attributes:
        batch: Sequences at a time.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens decoded after it.
        repeats: Timed rounds; the median is reported.
    """

    batch: int = Field(default=8, gt=0)
    prompt_tokens: int = Field(default=128, gt=0)
    new_tokens: int = Field(default=32, gt=0)
    repeats: int = Field(default=5, gt=0)


class Recipe(_Section):
    """Everything a run does.

    Attributes:
        model: ``demo``, a folder or a Hub id.
        title: Heading of the report.
        dtype: dtype in which the model runs; ``auto`` is the stored one.
        calibrate: Text for the statistics, and what is summed.
        variants: Pruned models to compare with the original.
        deploy: Engines that are to serve them, or their names alone. The number of experts nearest to a variant's
            ``keep`` that they serve well is taken; a ``keep_experts`` that one of them cannot serve is refused.
        export: Name of the variant that is written as a checkpoint and verified; where missing, the only variant if
            there is but one, else none.
        evaluate: Tasks that all are measured on; none where missing.
        throughput: Speed measurement; none where missing.
    """

    model: str = Field(min_length=1)
    title: str = "moeprune report"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibrate: Calibration
    variants: tuple[Variant, ...] = Field(min_length=1)
    deploy: Annotated[tuple[Deployment, ...], BeforeValidator(_as_deployments)] = Field(default=(), alias="for")
    export: str | None = None
    evaluate: Evaluation | None = None
    throughput: Throughput | None = None

    @property
    def plans(self) -> tuple[PlanSettings, ...]:
        """Every variant, lists resolved, in the order of the recipe."""
        return tuple(settings for variant in self.variants for settings in _resolve(variant))

    @property
    def where(self) -> tuple[Serving, ...]:
        """What ``deploy`` says, as planners and checks take it."""
        return tuple(deployment.serving for deployment in self.deploy)

    @property
    def exported(self) -> str | None:
        """The variant that is written as a checkpoint: the one named, or the only one there is."""
        return self.export or (self.plans[0].name if len(self.plans) == 1 else None)

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        names = [settings.name for settings in self.plans]
        for name in names:
            if name == ORIGINAL:
                raise ValueError(
                    f"a variant is named {ORIGINAL!r}, or changes nothing; the original is measured in any case. "
                    "Give it a name, fewer experts or a lower top_k"
                )
            if names.count(name) > 1:
                raise ValueError(f"two variants are named {name!r}; give them names of their own")
        for settings in self.plans:
            level, given = SCORES.get(settings.score).level, self.calibrate.statistics
            if LEVELS.index(level) > LEVELS.index(given):
                raise ValueError(
                    f"the score {settings.score!r} needs more than the {given} statistics; "
                    f"give calibrate.statistics: {level}"
                )
        if self.export is not None and self.export not in names:
            raise ValueError(f"export names an unknown variant {self.export!r}. {did_you_mean(self.export, names)}")
        return self


ORIGINAL = "original"
SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("calibrate",): Calibration,
    ("calibrate", "data"): DataSpec,
    ("calibrate", "self_generate"): DataSpec,
    ("variants",): Variant,
    ("for",): Deployment,
    ("evaluate",): Evaluation,
    ("throughput",): Throughput,
}


def _resolve(variant: Variant) -> list[PlanSettings]:
    resolved = []
    for score, keep, top_k in itertools.product(variant.score, variant.keep, variant.top_k):
        share = None if variant.keep_experts else keep
        kept = f"{variant.keep_experts}e" if variant.keep_experts else f"{keep * 100:g}"
        parts = [f"{score}-{kept}"] if variant.keep_experts or keep < 1 else []
        parts += [f"topk-{top_k}"] if top_k else []
        parts += [] if variant.groups else ["no-groups"]
        resolved.append(
            PlanSettings(
                name=variant.name or "-".join(parts) or ORIGINAL, score=score, keep=share,
                keep_experts=variant.keep_experts, top_k=top_k, groups=variant.groups, mtp=variant.mtp,
                domains=variant.domains, seed=variant.seed,
            )
        )  # fmt: skip
    return resolved


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key is given once: plain YAML takes the last of two and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: If the file is missing, is not YAML, or does not say what a recipe must; all mistakes at once.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe. `moeprune ls recipes` lists those that ship with moeprune.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping with keys such as model, calibrate and variants.")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = _own_mistakes(error)
        lines = "\n".join(f"  {_explain(mistake)}" for mistake in mistakes)
        raise RecipeError(f"{path}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:\n{lines}") from error


def _own_mistakes(error: ValidationError) -> list[Any]:
    """Without those that only follow from others, such as a list that lost its faulty entries."""
    mistakes = error.errors()
    places = [mistake["loc"] for mistake in mistakes]
    return [
        mistake
        for mistake in mistakes
        if not any(place != mistake["loc"] and place[: len(mistake["loc"])] == mistake["loc"] for place in places)
    ]


def _explain(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"]) or "recipe"
    if mistake["type"] != "extra_forbidden":
        return f"{where}: {mistake['msg'].removeprefix('Value error, ')}"
    section = SECTIONS.get(tuple(part for part in mistake["loc"][:-1] if isinstance(part, str)), Recipe)
    keys = [field.alias or name for name, field in section.model_fields.items()]
    return f"{where}: unknown key. {did_you_mean(str(mistake['loc'][-1]), keys)}"


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML."""
    values = recipe.model_dump(mode="json", by_alias=True)
    for variant in values["variants"]:
        if variant["keep_experts"] is not None:
            del variant["keep"]  # beside keep_experts even its default would be read as a contradiction
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
