"""Keep what a quantisation config says of experts true after some are gone and the others have new numbers.

Quantisers record which modules they left alone or treated specially. Names of single experts are dropped or renumbered;
patterns that hold for all experts of a layer alike stay as they are; patterns that single out experts by number are
refused, since nothing says which numbers their author would have written for the pruned model.

Every list entry and every key below the config is looked at, whatever it is called, so that no quantiser's own field is
forgotten: ``modules_to_not_convert``, ``ignored_layers``, ``ignore``, ``llm_int8_skip_modules``, ``exclude_modules``,
``quantized_layers``, ``layer_quant_config``, ``config_groups.*.targets``, ``dynamic``, ``extra_config``, ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeprune.anatomy.formats import StoredFormat
from moeprune.anatomy.quantization import CONFIG_KEYS, HF_QUANT_CONFIG
from moeprune.export.expert_names import ExpertNames
from moeprune.files import read_json

# What quantisers write beside config.json: ModelOpt, GPTQModel, AutoAWQ, AutoRound.
QUANTIZATION_FILES = (HF_QUANT_CONFIG, "quantize_config.json", "quant_config.json", "quantization_config.json")


def remap_quantization_config(
    config: Mapping[str, Any],
    *,
    keep: Mapping[str, Sequence[int]],
    num_experts: int,
    modules: Iterable[str],
    dropped: Collection[str] = (),
) -> dict[str, Any]:
    """A copy of a config.json whose quantisation entries name the experts of the pruned model.

    Args:
        config: The text of config.json. Entries of nested configs (``text_config``) are remapped too.
        keep: Kept expert ids by path of the decoder layer, MTP layers included if they are pruned.
        num_experts: Experts of a layer before pruning.
        modules: Stored names of the experts' modules (``model.layers.0.mlp.experts.3.up_proj``, see
            :func:`stored_modules`), on which patterns are tried; none where experts are stored fused.
        dropped: Layers that are left out altogether.

    Raises:
        UnsupportedModelError: If an entry singles out experts in a way that cannot be carried over.
    """
    names = ExpertNames(keep, num_experts=num_experts, modules=modules, dropped=dropped)

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


def remap_hf_quant_config(
    raw: Mapping[str, Any],
    *,
    keep: Mapping[str, Sequence[int]],
    num_experts: int,
    modules: Iterable[str],
    dropped: Collection[str] = (),
    name: str = HF_QUANT_CONFIG,
) -> dict[str, Any]:
    """A copy of one of :data:`QUANTIZATION_FILES` that names the experts of the pruned model.

    Args:
        raw: Its text.
        keep: As for :func:`remap_quantization_config`, like the next three.
        num_experts: Experts of a layer before pruning.
        modules: Stored names of the experts' modules.
        dropped: Layers that are left out altogether.
        name: The file's name, for errors.

    Raises:
        UnsupportedModelError: If an entry singles out experts in a way that cannot be carried over.
    """
    return ExpertNames(keep, num_experts=num_experts, modules=modules, dropped=dropped).remap(raw, name)


def read_quantization_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The quantisers' files beside config.json, by name."""
    return {name: read_json(folder / name) for name in QUANTIZATION_FILES if (folder / name).is_file()}


def stored_modules(keys: Iterable[str], *, stored: StoredFormat | None) -> list[str]:
    """The modules that stored keys belong to, each once and in order: ``...experts.3.up_proj``.

    Args:
        keys: Stored keys.
        stored: Their format, or None if they are not quantised.
    """
    bases = ((stored.companion(key) if stored else None, key) for key in keys)
    return list(dict.fromkeys((found.base if found else key).removesuffix(".weight") for found, key in bases))
