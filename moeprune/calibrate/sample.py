"""A bounded sample of calibration tokens, the same however the text is cut into batches or shared among ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from moeprune.calibrate.rows import Rows

SAMPLED_TOKENS = 4096


class TokenSample:
    """The tokens whose hash of domain, row and position is smallest.

    Attributes:
        num_tokens: How many there are.
        domain: Index of each sampled token's domain, in the order in which they are stored.
        row: Its row in the domain.
        position: Its place in the row.
    """

    def __init__(self, domains: Sequence[Rows], *, tokens: int = SAMPLED_TOKENS, seed: int = 0):
        """Choose ``tokens`` tokens of text, or all if there are fewer.

        Args:
            domains: The whole text, also where this rank runs only a part of it.
            tokens: Size of the sample.
            seed: Another seed is another sample.
        """
        places = [np.argwhere(rows.mask.numpy()) for rows in domains]
        hashes = [_hashes(rows.domain, at, seed) for rows, at in zip(domains, places, strict=True)]
        table = np.concatenate([np.insert(at, 0, index, axis=1) for index, at in enumerate(places)])
        # The order of the file is that of the text; the hash decides only who is in it.
        chosen = np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:tokens])
        self.domain, self.row, self.position = table[chosen].T
        self.num_tokens = len(chosen)
        self._slots = {}
        for index, rows in enumerate(domains):
            slots = torch.full(rows.ids.shape, -1, dtype=torch.int32)
            (mine,) = np.nonzero(self.domain == index)
            at = (torch.from_numpy(self.row[mine]), torch.from_numpy(self.position[mine]))
            slots[at] = torch.from_numpy(mine).to(torch.int32)
            self._slots[rows.domain] = slots

    def slots(
        self, domain: str, rows: Int[Tensor, " batch"], width: int
    ) -> tuple[Bool[Tensor, " tokens"], Int[Tensor, " sampled"]]:
        """Which tokens of a batch are sampled, and where in the sample each of those is.

        Args:
            domain: Name of the domain.
            rows: Rows of the batch, counted over the whole domain.
            width: Tokens of a row in the batch; rows may be cut short.
        """
        slots = self._slots[domain][rows, :width].reshape(-1)
        return slots >= 0, slots[slots >= 0].long()


def _hashes(domain: str, places: Int[ndarray, "tokens 2"], seed: int) -> Int[ndarray, " tokens"]:
    """A well mixed 64-bit number for each place (the finaliser of SplitMix64, by Sebastiano Vigna, public domain)."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {domain}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = (places[:, 0].astype(np.uint64) << np.uint64(32)) + places[:, 1].astype(np.uint64) + np.uint64(key)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
