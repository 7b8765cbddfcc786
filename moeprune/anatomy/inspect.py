"""What a deployer wants to know of a model before pruning it. Headers only: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.anatomy.anatomy import Anatomy
from moeprune.anatomy.derive import derive_anatomy
from moeprune.anatomy.names import NUM_MTP, find_field
from moeprune.anatomy.parts import QUANTISED_PARTS, dense_layers, quantised_parts
from moeprune.anatomy.quantization import HF_QUANT_CONFIG, Quantisation, quantisation_of, quantization_entry
from moeprune.anatomy.sizes import MTP, ModelSizes, measure_sizes
from moeprune.anatomy.skeleton import load_config
from moeprune.checkpoint.folder import has_weights, open_checkpoint, read_config, read_object
from moeprune.errors import UnsupportedModelError
from moeprune.plan.plan import num_to_keep

SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
PRUNE_SHARES = (0.25, 0.5)


def inspect_model(path: Path) -> dict[str, Any]:
    """Describe a checkpoint folder, or a folder that holds config.json alone.

    Args:
        path: The folder.

    Returns:
        Plain JSON: family, layers, counts, context, router, quantisation, parameters and bytes by part, and what
        pruning 25 % and 50 % of the experts would leave. Bytes are those of the stored tensors, or follow from the
        config's dtype and quantisation without weights. Multi-token prediction layers stand apart, in no parameter
        count.

    Raises:
        CheckpointError, UnsupportedModelError: If it is damaged or has no experts.
    """
    raw = read_config(path)
    anatomy = derive_anatomy(load_config(path))
    beside = path / HF_QUANT_CONFIG
    quantisation = quantisation_of(raw, hf_quant_config=read_object(beside) if beside.is_file() else None)
    entry = quantization_entry(raw)
    checkpoint = open_checkpoint(path) if has_weights(path) else None
    sizes = measure_sizes(
        anatomy,
        checkpoint.tensors if checkpoint else None,
        quantisation=quantisation,
        quantised=quantised_parts(entry) if entry else QUANTISED_PARTS,
    )
    if checkpoint and not sizes.num_bytes["routed experts"]:
        raise UnsupportedModelError(
            f"{path}: none of the stored tensors is a routed expert of {anatomy.config.model_type}."
        )
    return {
        "path": str(path),
        "model_type": anatomy.config.model_type,
        "architecture": type(anatomy.skeleton).__name__,
        "context": anatomy.context,
        "num_layers": anatomy.text_config.num_hidden_layers,
        "moe_layers": [layer.name for layer in anatomy.layers],
        "dense_layers": dense_layers(anatomy),
        "num_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "shared_experts": _shared_experts(anatomy, sizes),
        "router": anatomy.routing.describe(),
        "routing": anatomy.routing.model_dump(),
        "quantisation": _quantisation(quantisation),
        "multi_token_prediction": _mtp(anatomy, sizes),
        "weights_read_from": "headers" if checkpoint else "config only",
        "parameters": {"total": sizes.total(), "active": sizes.active(), "by_part": sizes.parameters},
        "bytes": {
            "total": sizes.stored(),
            "an_expert": sizes.bytes_per_expert,
            "by_part": sizes.num_bytes,
            "by_dtype": sizes.dtypes,
        },
        "pruned": [_pruned(anatomy, sizes, share) for share in PRUNE_SHARES],
    }


def _quantisation(quantisation: Quantisation | None) -> Mapping[str, Any] | None:
    if quantisation is None:
        return None
    return {"method": quantisation.method, "title": quantisation.title, "bits": quantisation.bits}


def _mtp(anatomy: Anatomy, sizes: ModelSizes) -> Mapping[str, Any] | None:
    """What is stored of multi-token prediction layers; their number is the config's."""
    field = find_field(anatomy.config, NUM_MTP)
    stored = sizes.num_bytes.get(MTP, 0)
    if field is None and not stored:
        return None
    return {"layers": field.value if field else None, "parameters": sizes.mtp_parameters, "bytes": stored}


def _shared_experts(anatomy: Anatomy, sizes: ModelSizes) -> int:
    field = find_field(anatomy.config, SHARED_COUNTS)
    if field is not None and sizes.parameters["shared experts"]:
        return field.value
    return int(sizes.parameters["shared experts"] > 0)


def _pruned(anatomy: Anatomy, sizes: ModelSizes, share: float) -> dict[str, Any]:
    facts = anatomy.facts(name="", fingerprint="")
    kept = num_to_keep(facts, keep=1 - share)
    top_k = min(sizes.top_k, kept)
    return {
        "prune": share,
        "num_experts": kept,
        "parameters": sizes.total(num_experts=kept),
        "active": sizes.active(num_experts=kept, top_k=top_k),
        "bytes": sizes.stored(num_experts=kept),
    }
