"""Running sums of one layer over pairs of experts and over hidden states: what merging experts needs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moeprune.calibrate.experts.seen import Seen


class MergeAccumulator:
    """Running sums of one layer, in float64 on its device.

    Products of logits are taken in float64. Outputs are added in float32 within one call, then in float64: a second
    copy of all outputs would cost more than the sums.
    """

    def __init__(self, num_experts: int, device: torch.device):
        self.coactivation = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        self.logit_sum = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.logit_gram = torch.zeros_like(self.coactivation)
        self.output_sum: Tensor | None = None
        self.gated_output_sum: Tensor | None = None
        self._call: tuple[Seen, Tensor, Tensor, Tensor] | None = None

    def begin(self, seen: Seen, keep: Bool[Tensor, " tokens"] | None) -> None:
        """Prepare for the outputs of a call."""
        counted = seen.gates != 0 if keep is None else keep[seen.tokens] & (seen.gates != 0)
        experts = len(self.logit_sum)
        # Slots that do not count go to a row of their own, which is thrown away: they may hold NaN.
        rows = torch.where(counted, seen.experts, experts)
        plain = torch.zeros(experts + 1, seen.outputs.shape[-1], dtype=torch.float32, device=seen.outputs.device)
        self._call = seen, rows, plain, torch.zeros_like(plain)

    def visit(self, rows: slice, outputs: Float[Tensor, "rows hidden"]) -> None:
        """Add some of the outputs, in float32."""
        assert self._call is not None
        seen, into, plain, gated = self._call
        if seen.weighted:
            gated.index_add_(0, into[rows], outputs)
            return
        plain.index_add_(0, into[rows], outputs)
        gated.index_add_(0, into[rows], outputs * seen.gates[rows].float().unsqueeze(-1))

    def end(self) -> None:
        """Add the call to the sums."""
        assert self._call is not None
        seen, _, plain, gated = self._call
        self.gated_output_sum = _added(self.gated_output_sum, gated)
        if not seen.weighted:
            self.output_sum = _added(self.output_sum, plain)
        self._call = None

    def add_pairs(
        self,
        chosen: Bool[Tensor, "tokens experts"],
        logits: Float[Tensor, "tokens experts"] | None,
        keep: Bool[Tensor, " tokens"] | None,
    ) -> None:
        """Add which experts were chosen together, and the products of the router's logits."""
        # Counts below 2^24 are exact in float32.
        ones = (chosen if keep is None else chosen & keep.unsqueeze(-1)).float()
        self.coactivation += ones.t() @ ones
        if logits is not None:
            values = (logits if keep is None else torch.where(keep.unsqueeze(-1), logits, 0.0)).double()
            self.logit_sum += values.sum(0)
            self.logit_gram += values.t() @ values

    def whole(self) -> dict[str, Tensor]:
        """The sums by name."""
        arrays = {
            "coactivation": self.coactivation,
            "logit_sum": self.logit_sum,
            "logit_gram": self.logit_gram,
            "output_sum": self.output_sum,
            "gated_output_sum": self.gated_output_sum,
        }
        return {name: array for name, array in arrays.items() if array is not None}


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    part = part[:-1].double()
    return part if total is None else total.add_(part)
