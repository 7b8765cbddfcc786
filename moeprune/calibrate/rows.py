"""Rows of token ids, and how a model is given them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Index = slice | Sequence[int] | Int[Tensor, " picked"]


class Rows:
    """Token rows of one domain.

    Attributes:
        domain: Its name.
        ids: Token ids, (rows, length).
        mask: True where a token is text; padding stands at the ends of rows.
        segments: Which document of its row a token belongs to, (rows, length): tokens attend within their document
            and positions begin at 0 in each. Padding is a segment of its own. None where all of a row is one text.
        ragged: Whether rows are documents of different lengths, so that a batch need not be wider than its longest.
    """

    def __init__(
        self,
        domain: str,
        ids: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        segments: Int[Tensor, "rows length"] | None = None,
        *,
        ragged: bool = False,
    ):
        self.domain = domain
        self.ids = ids
        self.mask = mask
        self.segments = segments
        self.ragged = ragged

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of text, padding excluded."""
        return int(self.mask.sum())

    @property
    def packing(self) -> str:
        """``isolate``, ``pad`` or ``concat`` (see :data:`moeprune.calibrate.text.packing.PACKINGS`)."""
        return "isolate" if self.segments is not None else "pad" if self.ragged else "concat"

    @property
    def positions(self) -> Int[Tensor, "rows length"]:
        """Position of each token: in its document where documents are kept apart, else in its row."""
        places = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        if self.segments is None:
            return places
        begins = torch.ones_like(self.mask)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return places - torch.where(begins, places, 0).cummax(dim=1).values

    def sha256(self) -> str:
        """Hash of everything that a model is given of this text, whatever the domain is called."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)} {self.packing}".encode())
        for tensor in (self.ids, self.mask, self.segments):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def inputs(self, rows: Index = slice(None), *, flatten: bool = False) -> dict[str, Tensor]:
        """Keyword arguments of the decoder for some of the rows; those of a model's forward pass, on the CPU.

        Documents are kept apart by their positions alone: transformers takes a position that does not follow the last
        one as the beginning of another sequence, provided that there is no attention mask and no cache
        (``transformers.masking_utils.find_packed_sequence_indices``). So padding is a sequence, too, instead of masked.

        Args:
            rows: Which ones.
            flatten: Give documents that are kept apart as one long row: flash attention recognises them in a batch of
                one only (``transformers.modeling_flash_attention_utils._is_packed_sequence``).
        """
        part = self.select(rows)
        if part.segments is not None:
            shape = (1, -1) if flatten else tuple(part.ids.shape)
            return {"input_ids": part.ids.reshape(shape), "position_ids": part.positions.reshape(shape)}
        return {"input_ids": part.ids} | ({} if part.mask.all() else {"attention_mask": part.mask.long()})

    def select(self, rows: Index) -> Rows:
        """Some of the rows, in the order given."""
        picked = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        segments = None if self.segments is None else self.segments[picked]
        return Rows(self.domain, self.ids[picked], self.mask[picked], segments, ragged=self.ragged)

    def batches(self, batch_size: int, *, rows: Index = slice(None)) -> Iterator[Rows]:
        """The rows, ``batch_size`` at a time; where they are ragged, no wider than the longest of the batch.

        Args:
            batch_size: Rows a batch; the last one may have fewer.
            rows: Which ones, in which order; all of them by default.
        """
        picked = self.select(rows)
        for begin in range(0, len(picked), batch_size):
            batch = picked.select(slice(begin, begin + batch_size))
            yield batch._trimmed() if self.ragged else batch

    def _trimmed(self) -> Rows:
        assert self.segments is None
        width = max(1, int(self.mask.sum(dim=1).max()))
        return Rows(self.domain, self.ids[:, :width], self.mask[:, :width], ragged=True)
