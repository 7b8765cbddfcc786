"""Keep what a quantisation config says of experts true after some are gone and the others have new numbers.

Quantisers record which modules they left alone or treated specially. Names of single experts are dropped or renumbered;
patterns that hold for all experts of a layer alike stay as they are; patterns that single out experts by number are
refused, since nothing says which numbers their author would have written for the pruned model.

Every list entry and every key below the config is looked at, whatever it is called, so that no quantiser's own field is
forgotten: ``modules_to_not_convert``, ``ignored_layers``, ``ignore``, ``llm_int8_skip_modules``, ``exclude_modules``,
``quantized_layers``, ``layer_quant_config``, ``config_groups.*.targets``, ``dynamic``, ``extra_config``, ...
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.anatomy.quantization import CONFIG_KEYS, HF_QUANT_CONFIG
from moeprune.anatomy.roles import AllExperts, OneExpert
from moeprune.errors import CheckpointError
from moeprune.export.expert_names import ExpertNames, numbers_of
from moeprune.files import read_json

if TYPE_CHECKING:
    from moeprune.anatomy.formats import StoredFormat
    from moeprune.anatomy.source import Source
    from moeprune.export.slices import OutputTensor
    from moeprune.plan.plan import Plan

# What quantisers write beside config.json: ModelOpt, GPTQModel, AutoAWQ, AutoRound.
QUANTIZATION_FILES = (HF_QUANT_CONFIG, "quantize_config.json", "quant_config.json", "quantization_config.json")
_LAYER = re.compile(r"(?:[A-Za-z_]\w*\.)+\d+(?=\.)")


def remap_quantization_config(config: Mapping[str, Any], names: ExpertNames) -> dict[str, Any]:
    """A copy of a config.json whose quantisation entries name the experts of the pruned model.

    Args:
        config: The text of config.json. Entries of nested configs (``text_config``) are remapped too.
        names: The experts' new names.

    Raises:
        UnsupportedModelError: If an entry singles out experts in a way that cannot be carried over.
    """

    def visit(node: Mapping[str, Any], path: str) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for key, value in node.items():
            if key in CONFIG_KEYS:
                new[key] = names.remap(value, f"{path}{key}")
            elif isinstance(value, Mapping) and key.endswith("_config"):
                new[key] = visit(value, f"{path}{key}.")
            else:
                new[key] = value
        return new

    return visit(config, "")


def remap_quantization_file(raw: Mapping[str, Any], names: ExpertNames, *, name: str) -> dict[str, Any]:
    """A copy of one of :data:`QUANTIZATION_FILES` that names the experts of the pruned model.

    Args:
        raw: Its text.
        names: The experts' new names.
        name: The file's name, for errors.

    Raises:
        UnsupportedModelError: If an entry singles out experts in a way that cannot be carried over.
    """
    return names.remap(raw, name)


def remapped_configs(
    config: Mapping[str, Any], *, source: Source, plan: Plan, outputs: Iterable[OutputTensor]
) -> dict[str, dict[str, Any]]:
    """The files of a pruned checkpoint that say how it is quantised, by name; config.json is the last.

    Args:
        config: The text of config.json, of which only the quantisation entries change.
        source: The model.
        plan: What is kept.
        outputs: The tensors of the pruned checkpoint.

    Raises:
        CheckpointError: If one of them is no JSON object.
        UnsupportedModelError: If an entry singles out experts in a way that cannot be carried over.
    """
    if source.quantisation is None:
        return {"config.json": dict(config)}
    modules = stored_modules(source.roles, stored=source.quantisation.stored)
    names = ExpertNames(written_numbers(source, plan=plan, outputs=outputs), modules=modules)
    beside = {name: _read(source.path / name) for name in QUANTIZATION_FILES if (source.path / name).is_file()}
    files = {name: remap_quantization_file(raw, names, name=name) for name, raw in beside.items()}
    return files | {"config.json": remap_quantization_config(config, names)}


def written_numbers(source: Source, *, plan: Plan, outputs: Iterable[OutputTensor]) -> dict[str, dict[int, int | None]]:
    """What becomes of each expert's stored number, by stored path of its layer, read off the tensors to be written.

    So it holds for whatever the exporter does: several sets of experts in one numbering, MTP layers pruned or left out.

    Args:
        source: The model.
        plan: What is kept.
        outputs: The tensors of the pruned checkpoint.
    """
    written = {tensor.source.name: tensor.name for tensor in outputs}
    numbers: dict[str, dict[int, int | None]] = defaultdict(dict)
    for key, role in source.roles.items():
        layer = _LAYER.match(key)
        if layer is None:
            continue
        if isinstance(role, OneExpert):
            new = written.get(key)
            number = None if new is None else int(new[role.start : len(new) - len(key) + role.stop])
            numbers[layer.group()][int(key[role.start : role.stop])] = number
        elif isinstance(role, AllExperts) and layer.group() not in numbers:
            keep = plan.keep[role.layer] if key in written else ()
            fused = numbers_of({layer.group(): keep}, num_experts=plan.model.num_experts)
            numbers[layer.group()] = dict(fused[layer.group()])
    return dict(numbers)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}. Download it again.")
    return raw


def stored_modules(keys: Iterable[str], *, stored: StoredFormat) -> list[str]:
    """The modules that stored keys belong to, each once and in order: ``...experts.3.up_proj``.

    Args:
        keys: Stored keys.
        stored: Their format.
    """
    bases = ((stored.companion(key), key) for key in keys)
    return list(dict.fromkeys((found.base if found else key).removesuffix(".weight") for found, key in bases))
