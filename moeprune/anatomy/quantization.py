"""How a checkpoint is quantised, from its config: for people, for refusals, and for reading its stored keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.anatomy.formats import FORMATS, StoredFormat, format_of
from moeprune.anatomy.names import FORMER_KEYS
from moeprune.errors import CheckpointError, UnsupportedModelError, did_you_mean

CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' older spelling
HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's file beside config.json
WAY_OUT = "Prune the unquantised checkpoint and quantise the result."


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: ``quant_method`` as the config has it.
        title: For people: ``FP8 block 128x128``.
        bits: Bits of a quantised weight, without its scales; None where weights differ.
        stored: How its tensors are spelled.
    """

    method: str
    title: str
    bits: int | None
    stored: StoredFormat


def quantisation_of(
    config: Mapping[str, Any],
    *,
    hf_quant_config: Mapping[str, Any] | None = None,
    where: str | Path = "config.json",
) -> Quantisation | None:
    """How a checkpoint is quantised, or None if it is not.

    Args:
        config: The text of config.json.
        hf_quant_config: The text of hf_quant_config.json, if there is one.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: If the entry is malformed.
        UnsupportedModelError: If the format is not one that moeprune prunes.
    """
    entry = quantization_entry(config, where=where)
    if entry is None and hf_quant_config is not None:
        # Written beside config.json by ModelOpt, whose older releases left config.json alone.
        entry = {**_object(hf_quant_config, "quantization", HF_QUANT_CONFIG), "quant_method": "modelopt"}
    if entry is None:
        return None
    method = _method(entry, where)
    sparse = _object(entry, "sparsity_config", where).get("format") or "dense"
    if sparse != "dense":
        raise UnsupportedModelError(f"{where}: stored sparse ({sparse}): moeprune does not prune this. {WAY_OUT}")
    stored = _stored_format(method, entry, where)
    try:
        title, bits = _DESCRIBERS[stored.name](entry)
        if bits is not None and bits not in range(1, 65):
            raise ValueError(f"{bits!r} bits")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: the quantization config is not one of {stored.name} as its writers make them ({error!r})."
        ) from error
    return Quantisation(method, title, bits, stored)


NESTED = ("text_config", *FORMER_KEYS["text_config"], "thinker_config")


def quantization_entry(config: Mapping[str, Any], *, where: str | Path = "config.json") -> Mapping[str, Any] | None:
    """The quantisation entry of a config.json, of its text model if it has none of its own; None if it has neither.

    Raises:
        CheckpointError: If it is not an object.
    """
    for holder in (config, *(value for key, value in config.items() if key in NESTED)):
        for key in CONFIG_KEYS if isinstance(holder, Mapping) else ():
            entry = holder.get(key)
            if entry is not None and not isinstance(entry, Mapping):
                raise CheckpointError(f"{where}: {key} is {type(entry).__name__}, expected an object.")
            if entry:
                return entry
    return None


def _object(holder: Mapping[str, Any], key: str, where: str | Path) -> Mapping[str, Any]:
    value = holder.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {key} is {type(value).__name__}, expected an object.")
    return value


def refuse_merge(quantisation: Quantisation | None) -> None:
    """Refuse to merge experts of a quantised checkpoint.

    Raises:
        UnsupportedModelError: If it is quantised: an average of packed integers means nothing, and an average of
            dequantised weights would have to be quantised again, which is the quantiser's work.
    """
    if quantisation is not None:
        raise UnsupportedModelError(
            f"the experts are stored quantised ({quantisation.title}). Merging needs arithmetic on unquantised "
            "weights: merge the unquantised checkpoint and quantise the result, or prune without merging."
        )


def _method(entry: Mapping[str, Any], where: str | Path) -> str:
    # transformers, too, lets the flags of bitsandbytes overrule `quant_method` (quantizers/auto.py).
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return f"bitsandbytes_{4 if entry.get('load_in_4bit') else 8}bit"
    method = entry.get("quant_method")
    if isinstance(method, str):
        return method
    if "config_groups" in entry:
        return "compressed-tensors"
    if "quant_algo" in entry or "quant_algo" in _object(entry, "quantization", where):
        return "modelopt"
    raise CheckpointError(f"{where}: quantization_config has no quant_method. It has: {', '.join(entry)}.")


def _stored_format(method: str, entry: Mapping[str, Any], where: str | Path) -> StoredFormat:
    stored = format_of(method.lower())
    if stored is None:
        known = [name for each in FORMATS.values() for name in each.methods]
        raise UnsupportedModelError(
            f"{where}: stored quantised with {method!r}, which moeprune does not prune. {did_you_mean(method, known)} "
            f"{WAY_OUT}"
        )
    packing = str(entry.get("packing_format", ""))
    if "auto" in method and "round" in method:
        if "llm_compressor" in packing:
            return FORMATS["compressed-tensors"]
        if "awq" in packing:
            return FORMATS["awq"]
        # `auto_round:nv_fp`, `auto_round:mx_fp` and `auto_round:fp8` are other formats; the others are GPTQ's.
        if packing and ("fp" in packing or not any(known in packing for known in ("gptq", "auto_round"))):
            raise UnsupportedModelError(
                f"{where}: stored by AutoRound as {packing!r}, which moeprune does not prune. {WAY_OUT}"
            )
    return stored


def _fp8(entry: Mapping[str, Any]) -> tuple[str, int]:
    block = entry.get("weight_block_size")
    if entry.get("quant_method") == "mxfp8":
        return "MXFP8", 8
    return (f"FP8 block {block[0]}x{block[1]}" if block else "FP8 per tensor"), 8


def _compressed(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    groups = [group for group in (entry.get("config_groups") or {}).values() if group.get("weights")]
    titles, bits = [], set()
    for group in groups:
        weights = group["weights"]
        bits.add(weights.get("num_bits"))
        titles.append(_scheme(weights, str(group.get("format") or entry.get("format") or "")))
    title = " + ".join(dict.fromkeys(titles)) or "quantised"
    return f"{title} (compressed-tensors)", bits.pop() if len(bits) == 1 else None


def _scheme(weights: Mapping[str, Any], packing: str) -> str:
    """The name of one compressed-tensors weight scheme: ``INT4 g128``."""
    packed = re.match(r"(nvfp4|mxfp4|mxfp6|mxfp8)", packing)
    if packed:
        return packed.group().upper()
    kind = "FP" if weights.get("type") == "float" else "INT"
    strategy, group = weights.get("strategy"), weights.get("group_size")
    block = weights.get("block_structure")
    if strategy == "block" and block:
        detail = f" block {block[0]}x{block[1]}" if isinstance(block, list) else f" block {block}"
    elif group and group > 0:
        detail = f" g{group}"
    else:
        detail = f" per {strategy or 'tensor'}"
    return f"{kind}{weights.get('num_bits')}{detail}"


def _modelopt(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    algorithm = entry.get("quant_algo") or (entry.get("quantization") or {}).get("quant_algo")
    if algorithm is None:
        return _compressed(entry)[0].replace("compressed-tensors", "ModelOpt"), _compressed(entry)[1]
    # NVFP4, FP8, MXFP8, W4A16_AWQ, W4A8_NVFP4_FP8: the first number is the weights'.
    number = re.search(r"W(\d+)|FP(\d+)", algorithm.upper())
    return f"{algorithm} (ModelOpt)", int(number.group(1) or number.group(2)) if number else None


def _quark(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    weight = (entry.get("global_quant_config") or {}).get("weight") or {}
    dtype = str((weight[-1] if isinstance(weight, list) else weight).get("dtype", ""))
    number = re.search(r"\d+", dtype)
    return f"{dtype.upper() or 'quantised'} (Quark)", int(number.group()) if number else None


def _integer(name: str) -> Any:
    def describe(entry: Mapping[str, Any]) -> tuple[str, int | None]:
        label = "AutoRound" if "round" in str(entry.get("quant_method")) else name
        bits = entry.get("bits", entry.get("w_bit"))  # `w_bit` and `q_group_size` are AutoAWQ's own file
        group = entry.get("group_size", entry.get("q_group_size"))
        size = "" if group is None else " per channel" if group <= 0 else f" g{group}"
        return f"{label} {bits}-bit{size}" if bits else label, bits

    return describe


_DESCRIBERS: dict[str, Any] = {
    "fp8": _fp8,
    "fbgemm-fp8": lambda entry: ("FP8 per channel (FBGEMM)", 8),
    "mxfp4": lambda entry: ("MXFP4", 4),
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "quark": _quark,
    "gptq": _integer("GPTQ"),
    "awq": _integer("AWQ"),
    "bitsandbytes-4bit": lambda entry: (f"bitsandbytes 4-bit {entry.get('bnb_4bit_quant_type', 'fp4')}", 4),
    "bitsandbytes-8bit": lambda entry: ("bitsandbytes 8-bit", 8),
}
