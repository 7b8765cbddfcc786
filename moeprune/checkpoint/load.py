"""Load a checkpoint into memory, strictly: transformers only warns about keys that do not fit, and answers wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.global_scales import why_wrong
from moeprune.checkpoint.unloaded import is_expected
from moeprune.errors import CheckpointError, MoePruneError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGNMENT = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over GPUs, as accelerate names them."""


def choose_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``; anything else stays.

    Raises:
        MoePruneError: If the device is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MoePruneError(f"device {device!r} was asked for, but torch sees no CUDA device. Use --device cpu.")
    return device


def load_model(
    path: Path, *, dtype: str = "auto", device: str = "auto", device_map: str | dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a checkpoint folder and refuse it if any tensor is missing, unexpected or of another shape.

    Args:
        path: The folder.
        dtype: One of :data:`DTYPES`; ``auto`` keeps the stored one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: Instead of ``device``: one of :data:`DEVICE_MAPS`, to spread the model over all GPUs, or where each
            of its modules goes.

    Raises:
        CheckpointError: If it does not load without a remark.
        MoePruneError: If a device is not there, or the model does not fit the GPUs that it was to be spread over.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    from moeprune.checkpoint.classes import model_class, transformers_config

    if dtype not in DTYPES:
        raise MoePruneError(f"unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what matters of its report is raised below
    logging.disable_progress_bar()
    try:
        config = transformers_config(path)
        if getattr(config, "quantization_config", None) is not None:
            why = why_wrong(open_checkpoint(path).tensors)
            if why:
                raise CheckpointError(f"{path}: {why}. Load the unquantised checkpoint.")
        loaded: Any = model_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=_checked(device_map, device) or choose_device(device),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named and refused below
        )
    except MoePruneError:
        raise
    except (RuntimeError, ValueError, OSError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())  # some come in many lines
        raise CheckpointError(f"{path}: does not load: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    model, info = loaded
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not is_expected(key, config)]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            shown = ", ".join(str(key) for key in sorted(info[kind], key=str)[:3])
            raise CheckpointError(f"{path}: {len(info[kind])} {kind.replace('_', ' ')} while loading: {shown} ...")
    spread = getattr(model, "hf_device_map", {}).values()
    if isinstance(device_map, str) and not {"cpu", "disk"}.isdisjoint(map(str, spread)):
        raise MoePruneError(f"{path}: does not fit the GPUs together. Run it layer by layer instead: --stream.")
    align_memory(model)
    return model.eval()


def _checked(device_map: str | dict[str, Any] | None, device: str) -> str | dict[str, Any] | None:
    import torch

    if not isinstance(device_map, str):
        return device_map
    if device_map not in DEVICE_MAPS:
        raise MoePruneError(f"unknown device map {device_map!r}. {did_you_mean(device_map, DEVICE_MAPS)}")
    if device != "auto":
        raise MoePruneError(f"--device-map {device_map} uses all GPUs, --device {device} one. Give one of them.")
    if not torch.cuda.is_available():
        raise MoePruneError(
            f"--device-map {device_map} spreads a model over GPUs, but torch sees none. Leave it out, or run the model "
            "layer by layer: --stream."
        )
    return device_map


def align_memory(model: PreTrainedModel) -> None:
    """Move parameters that lie at odd addresses, as tensors mapped from a safetensors file do.

    Matrix products on a CPU round differently depending on the alignment of their operands; with all parameters
    aligned, equal weights give equal logits, bit for bit, whatever file they came from.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no tokenizer that transformers can load ({error}).") from error


@contextmanager
def long_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let texts be longer than the model's context inside the block: they are cut after they are tokenised.

    Without this, transformers warns that such a text would not fit the model.
    """
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = 1 << 60
    try:
        yield
    finally:
        tokenizer.model_max_length = limit
