"""Which model types of the installed transformers can be pruned, found by walking the package.

Every config class that names a number of experts is shrunk, built on the meta device and taken apart like a real model;
the support table is what came of it. A type that cannot be pruned is in the table with the reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.names import NUM_EXPERTS, NUM_MTP
from moeprune.anatomy.quirks.extra_rows import EXTRA_ROWS
from moeprune.errors import UnsupportedModelError
from moeprune.files import write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moeprune.anatomy.anatomy import Anatomy

RECORD = Path(__file__).with_name("families.json")
# Read in the models' code; where there is nothing here, the error of the attempt is the reason.
REASONS = {
    "doge": "its experts are rows of two embeddings, chosen by product keys: their number must stay a square",
    "openai_privacy_filter": "classifies tokens; it is no language model",
    "vitpose": "estimates poses; it is no language model",
    "vitpose_backbone": "estimates poses; it is no language model",
    "dots3_note_vision_encoder": "a vision tower, whose layers have different numbers of experts",
}


@dataclass(frozen=True)
class Family:
    """One row of the support table.

    Attributes:
        model_type: ``model_type`` of config.json.
        architecture: The class that is built; empty where there is none.
        prunable: Whether it can be pruned.
        reason: Why not; or of which type it is a part.
        router: How its router works.
        stored: Layouts of the experts on disk that are read.
        statistics: ``all``, the sums that calibration does not give, or why it gives none.
        notes: What is special about it.
    """

    model_type: str
    architecture: str = ""
    prunable: bool = False
    reason: str = ""
    router: str = ""
    stored: str = ""
    statistics: str = ""
    notes: tuple[str, ...] = ()


def moe_types() -> dict[str, type[PreTrainedConfig]]:
    """The config classes of the installed transformers that name a number of experts, by model type."""
    from transformers import CONFIG_MAPPING

    classes = {name: CONFIG_MAPPING[name] for name in sorted(CONFIG_MAPPING.keys())}
    return {name: cls for name, cls in classes.items() if _has_experts(cls)}


def _has_experts(config_class: type[PreTrainedConfig]) -> bool:
    from moeprune.anatomy.tiny import sub_configs_of

    fields = {field.name for field in dataclasses.fields(config_class)}
    return not fields.isdisjoint(NUM_EXPERTS) or any(_has_experts(part) for part in sub_configs_of(config_class))


def derive_families() -> Iterator[Family]:
    """Take every type apart; about half a minute on one core."""
    types = moe_types()
    parts = {
        part.model_type: name
        for name, cls in types.items()
        for part in _parts(cls)
        if part.model_type and part.model_type != name
    }
    for name, cls in types.items():
        yield derive_family(name, cls, part_of=parts.get(name))


def _parts(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedConfig]]:
    from moeprune.anatomy.tiny import sub_configs_of

    direct = sub_configs_of(config_class)
    return direct + [part for inner in direct for part in _parts(inner)]


def derive_family(model_type: str, config_class: type[PreTrainedConfig], *, part_of: str | None = None) -> Family:
    """One row.

    Args:
        model_type: The type's name.
        config_class: Its config class.
        part_of: The type whose config holds this one, if any.
    """
    from moeprune.anatomy.derive import derive_anatomy
    from moeprune.anatomy.tiny import tiny_config
    from moeprune.checkpoint.classes import model_class

    config = tiny_config(config_class)
    try:
        architecture = model_class(config).__name__
        anatomy = derive_anatomy(config)
    except UnsupportedModelError as error:
        reason = REASONS.get(model_type) or (f"part of {part_of}" if part_of else str(error).partition(": ")[2])
        return Family(model_type, reason=reason)
    return Family(
        model_type=model_type,
        architecture=architecture,
        prunable=True,
        router=anatomy.routing.describe(),
        stored=_stored(anatomy),
        statistics=_statistics(anatomy),
        notes=tuple(_notes(anatomy, config_class)),
    )


def _stored(anatomy: Anatomy) -> str:
    from moeprune.anatomy.renamer import Renamer

    if anatomy.own:
        return "each expert by itself"
    rename = Renamer(anatomy)
    return "each expert by itself, or all in one" if rename.stacks_experts else "all experts in one"


def _statistics(anatomy: Anatomy) -> str:
    from moeprune.calibrate.experts.kinds import observable
    from moeprune.calibrate.stats import EXPERT_SUMS

    if getattr(anatomy.config, "canvas_length", None):
        return "none: it denoises a canvas of random tokens, so that a pass over text says nothing of its experts"
    found = {observable(anatomy.skeleton.get_submodule(layer.experts)) for layer in anatomy.layers}
    refused = [reason for possible, reason in found if not possible]
    if refused:
        return f"none: {refused[0]}"
    given = set.intersection(*(set(text.split(", ")) for _, text in found))
    missing = [name for name in EXPERT_SUMS if name not in given]
    return f"all but {', '.join(missing)}" if missing else "all"


def _notes(anatomy: Anatomy, config_class: type[PreTrainedConfig]) -> Iterator[str]:
    from moeprune.anatomy.axes import decoder_layer_of

    text = anatomy.text_config
    if text.model_type in EXTRA_ROWS:
        yield f"router rows beyond the experts stay: {EXTRA_ROWS[text.model_type]}"
    if anatomy.expert_ids:
        yield "expert ids looked up by token are renumbered"
    if anatomy.top_k.fixed:
        yield f"its {anatomy.top_k.value} active expert(s) are fixed in its code"
    if len(anatomy.layers) > len({decoder_layer_of(anatomy.skeleton, layer.experts) for layer in anatomy.layers}):
        yield "two sets of experts in a layer, pruned to the same number"
    if anatomy.routing.n_group > 1:
        yield "routes in groups unless its config says otherwise"
    if any(getattr(config_class(), name, None) for name in NUM_MTP):
        yield "may come with prediction layers (--mtp)"
    if text is not anatomy.config:
        yield "multimodal: its language model is pruned"


def list_families() -> list[Family]:
    """The table for the installed transformers: as recorded, or derived anew for another release."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["transformers"] != version("transformers"):
        return list(derive_families())
    return [Family(**(row | {"notes": tuple(row["notes"])})) for row in record["families"]]


def to_record(families: list[Family]) -> dict[str, Any]:
    """The content of :data:`RECORD`."""
    return {"transformers": version("transformers"), "families": [asdict(family) for family in families]}


def to_markdown(families: list[Family]) -> str:
    """The tables of docs/families.md."""
    release = version("transformers")
    yes, no = [f for f in families if f.prunable], [f for f in families if not f.prunable]
    lines = [
        f"Of the {len(families)} model types with experts in transformers {release}, {len(yes)} can "
        "be pruned as they are.",
        "",
        "| model type | router | stored | statistics | notes |",
        "|---|---|---|---|---|",
        *(f"| `{f.model_type}` | {f.router} | {f.stored} | {f.statistics} | {'; '.join(f.notes)} |" for f in yes),
        "",
        "## Not pruned by themselves",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| `{f.model_type}` | {f.reason} |" for f in no),
        "",
    ]
    return "\n".join(lines)


def write_record(docs: Path) -> None:
    """Derive the table anew; write :data:`RECORD` and the part of docs/families.md that holds it."""
    families = list(derive_families())
    write_json(RECORD, to_record(families))
    before, _, _ = docs.read_text(encoding="utf-8").partition("Of the ")
    write_text(docs, before + to_markdown(families))


if __name__ == "__main__":
    write_record(Path(__file__).parents[1] / "docs" / "families.md")
