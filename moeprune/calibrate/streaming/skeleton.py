"""A model without weights, and all that transformers decides about loading them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moeprune.anatomy.source import Source
from moeprune.checkpoint.classes import model_class, transformers_config
from moeprune.checkpoint.load import DTYPES
from moeprune.errors import CheckpointError, MoePruneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are on the meta device, while the buffers that its class computes are real.

    Attributes:
        model: The model, in evaluation mode.
        dtype: What most of its parameters are loaded as.
        dtype_plan: Patterns of parameter names that are loaded as another dtype, as transformers has them.
        transforms: transformers' renamings and converters from stored keys, dequantisation included.
        quantizer: transformers' quantizer; None where the checkpoint is not quantised.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    dtype_plan: dict[str, torch.dtype]
    transforms: list[Any]
    quantizer: Any


def build_skeleton(source: Source, *, dtype: str, device: torch.device) -> Skeleton:
    """Build the model of a checkpoint as ``from_pretrained`` would, without its weights.

    Args:
        source: The checkpoint. A quantised one is dequantised when it is loaded.
        dtype: One of :data:`moeprune.checkpoint.load.DTYPES`; ``auto`` keeps the stored one.
        device: Where the model will run; its buffers are moved there.

    Raises:
        UnsupportedModelError: If transformers cannot dequantise the checkpoint.
        CheckpointError: If a package that it needs for this is missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if dtype not in DTYPES:
        raise MoePruneError(f"unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    config = copy.deepcopy(transformers_config(source.path))
    with quiet():
        quantizer = _quantizer(source, config)
        chosen = _dtype(source, config, dtype, quantizer)
        model = empty_model(model_class(config), config, dtype=chosen, device=device)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=chosen, device_map=None, checkpoint_files=[])
            model.tie_weights()
        transforms = get_model_conversion_mapping(model, None, quantizer)
        if quantizer is not None:
            quantizer.postprocess_model(model)
    return Skeleton(model, chosen, model._get_dtype_plan(chosen), transforms, quantizer)


def empty_model(
    model_type: type[PreTrainedModel], config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with its parameters on the meta device and the buffers that its class computes on ``device``."""
    from accelerate import init_empty_weights
    from transformers.modeling_utils import local_torch_dtype

    with quiet(), init_empty_weights(include_buffers=False), local_torch_dtype(dtype):
        model = model_type._from_config(config, dtype=dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _quantizer(source: Source, config: Any) -> Any:
    from transformers.quantizers.auto import get_hf_quantizer

    quantised = source.quantisation
    if quantised is None:
        return None
    source.check_runs()
    for holder in (config, config.get_text_config(decoder=True)):
        entry = getattr(holder, "quantization_config", None)
        if isinstance(entry, dict):
            entry["dequantize"] = True
    try:
        return get_hf_quantizer(config, None, None, True, {})[0]
    except ImportError as error:
        raise CheckpointError(f"{source.path}: stored as {quantised.title}: {error}") from error


def _dtype(source: Source, config: Any, dtype: str, quantizer: Any) -> torch.dtype:
    from transformers.modeling_utils import _get_dtype

    files = [str(shard) for shard in source.checkpoint.shards]
    return _get_dtype(dtype, files, config, None, None, True, quantizer)[1]


@contextmanager
def quiet() -> Iterator[None]:
    """No remarks of transformers inside the block: what matters of them is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
