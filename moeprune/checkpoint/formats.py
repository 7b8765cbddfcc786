"""What a folder holds instead of a safetensors checkpoint, and how to make one of it."""

from __future__ import annotations

from pathlib import Path

CONVERT = (
    "It is a pickle, which can run code when it is read; moeprune reads safetensors only. Convert it: on the Hub with "
    "https://huggingface.co/spaces/safetensors/convert, or here with "
    "`AutoModelForCausalLM.from_pretrained(OLD, dtype='auto').save_pretrained(NEW)`."
)
WAYS_OUT = {
    "adapter_model.*": "It is an adapter, not a model. Merge it into its base model (`merge_and_unload` of peft).",
    "*-of-*.safetensors": "The index is missing. Download the checkpoint again.",
    "consolidated.*": (
        "These are the weights in their maker's own format. Download the files in the format of transformers, or "
        "convert them with the conversion script of their family in transformers."
    ),
    "*.safetensors": "Rename it if it holds the whole model.",
    "*.gguf": "Give the GGUF file itself, not its folder.",
    "*.bin": CONVERT,
    "*.pt": CONVERT,
    "*.pth": CONVERT,
    "*.ckpt": CONVERT,
    "*.pkl": CONVERT,
}
"""By pattern of file names, the more telling first."""


def explain_missing_weights(folder: Path) -> str:
    """The end of an error message about a folder without safetensors weights: what is there instead, and what to do.

    Args:
        folder: The folder of a checkpoint.
    """
    for pattern, way_out in WAYS_OUT.items():
        names = sorted(file.name for file in folder.glob(pattern))
        if names:
            return f"found {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. {way_out}"
    return "found no weights. Download the checkpoint again, or save the model with `save_pretrained` first."
