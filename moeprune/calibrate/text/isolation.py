"""Whether a model keeps the documents of a row apart when their positions begin anew.

transformers (5.23) builds a mask from positions for models that hand them on to its mask functions. Some do not; linear
attention, state-space and convolution layers carry a state from one document into the next; sparse attention chooses
keys across documents. No list of them is kept: a toy of the model's class reads documents as one row and one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor

from moeprune.anatomy.tiny import VOCAB, tiny_config
from moeprune.calibrate.rows import Rows
from moeprune.calibrate.text.packing import PACKINGS, Packing
from moeprune.checkpoint.classes import model_class
from moeprune.errors import DataError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LENGTHS = (9, 7, 12)
EXACT, ROUNDED = 1e-3, 0.2
"""Apart: a row differs from its documents one by one by less than this share of what it would without positions.

For every token in float32; for the median token where a model runs in whatever dtype it has: rounding sends some tokens
to other experts. A model that mixes documents is near 1.
"""


def choose_packing(asked: str, *, config: PreTrainedConfig) -> Packing:
    """How rows are packed for a model.

    Args:
        asked: One of :data:`PACKINGS`.
        config: The model's config.

    Raises:
        DataError: If the model cannot do what was asked, with the way out.
    """
    if asked not in PACKINGS:
        raise DataError(f"unknown packing {asked!r}. {did_you_mean(asked, PACKINGS)}")
    if config.is_encoder_decoder:
        if asked in ("auto", "concat"):
            return "concat"  # its encoder reads the first half of every row, its decoder the second
        raise DataError(f"--pack {asked}: an encoder-decoder reads halves of full rows. Use --pack concat.")
    if asked in ("pad", "concat"):
        return "pad" if asked == "pad" else "concat"
    apart = toy_keeps_apart(config)
    if asked == "isolate" and not apart:
        raise DataError(
            f"--pack isolate: {config.model_type} does not keep the documents of a row apart. Use --pack pad."
        )
    return "isolate" if apart else "pad"


def toy_keeps_apart(config: PreTrainedConfig) -> bool:
    """Whether a toy of the model's class keeps documents apart; False also where no toy can be made to tell."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            toy = model_class(tiny_config(type(config)))._from_config(tiny_config(type(config)))
            _make_attentive(toy.eval())
            return keeps_apart(toy, vocab_size=VOCAB - 20, exactly=True)
        except (
            StrictDataclassError, UnsupportedModelError, ValueError, TypeError, RuntimeError, AttributeError,
            KeyError, IndexError, NotImplementedError,
        ):  # fmt: skip
            return False


def check_apart(model: PreTrainedModel) -> None:
    """Refuse a loaded model that does not keep documents apart: its layers may be of other kinds than its toy's.

    Raises:
        UnsupportedModelError: If it mixes them.
    """
    embeddings: Any = model.get_input_embeddings().weight
    if not keeps_apart(model, vocab_size=embeddings.shape[0]):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep the documents of a row apart. Use --pack pad."
        )


def _make_attentive(model: PreTrainedModel) -> None:
    """Weights so large that what a token attends to shows in its output; norms stay as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1 or "norm" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


@torch.inference_mode()
def keeps_apart(model: PreTrainedModel, *, vocab_size: int, exactly: bool = False) -> bool:
    """Whether documents in one row give what they give one by one.

    Args:
        model: The model, which runs on about a hundred tokens.
        vocab_size: Ids below this one are used.
        exactly: Every token must agree, not only the median one.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, vocab_size, (length,), generator=generator) for length in LENGTHS]
    row = torch.cat(documents)[None]
    mask = torch.ones_like(row, dtype=torch.bool)
    numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS)])[None]
    alone = torch.cat([_read(model, Rows("", ids[None], mask[:, : len(ids)])) for ids in documents], dim=1)
    joined = _read(model, Rows("", row, mask))
    apart = _read(model, Rows("", row, mask, numbers))
    later = slice(LENGTHS[0], None)  # the first document has none before it
    mixed = _distances(joined[:, later], alone[:, later])
    left = _distances(apart[:, later], alone[:, later])
    if exactly:
        return bool(mixed.median() > EXACT and left.max() < EXACT * mixed.median())
    return bool(mixed.median() > 0 and left.median() < ROUNDED * mixed.median())


def _distances(a: Float[Tensor, "one tokens hidden"], b: Float[Tensor, "one tokens hidden"]) -> Float[Tensor, "..."]:
    a, b = a.double(), b.double()
    return (a - b).norm(dim=-1) / b.norm(dim=-1)


def _read(model: PreTrainedModel, rows: Rows) -> Float[Tensor, "one tokens hidden"]:
    reader: Any = model.base_model
    while type(reader).forward is torch.nn.Module.forward:
        reader = next(iter(reader.children())).base_model  # Qwen3-Omni: the thinker, then the talker
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    inputs: dict[str, Int[Tensor, "one tokens"]] = {name: value.to(device) for name, value in rows.inputs().items()}
    return reader(**inputs, use_cache=False)[0].cpu()
