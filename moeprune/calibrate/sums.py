"""Running sums of one layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeprune.calibrate.stats import EXPERT_SUMS, LAYER_SUMS

CACHE_ELEMENTS = 131_072
SUM_COLUMNS = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum")
assert {*SUM_COLUMNS, "max_abs"} == EXPERT_SUMS.keys() and LAYER_SUMS.keys() == {"gate_entropy_sum"}


class LayerAccumulator:
    """Running sums of one layer over the tokens of one domain, in float64 on the layer's device."""

    def __init__(self, num_experts: int, device: torch.device):
        self.sums = torch.zeros(num_experts, len(SUM_COLUMNS), dtype=torch.float64, device=device)
        self.max_abs = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.gate_entropy = torch.zeros((), dtype=torch.float64, device=device)

    def add(
        self,
        outputs: Float[Tensor, "slots hidden"],
        gates: Float[Tensor, " slots"],
        experts: Int[Tensor, " slots"],
        keep: Bool[Tensor, " slots"] | None,
        *,
        weighted: bool = False,
    ) -> None:
        """Add routed slots (a slot is one token at one of its experts).

        A slot of weight 0 adds nothing to the model's result and is not counted: that is how zaya's router marks a
        token that skips its experts.

        Args:
            outputs: Unweighted output f of the slot's expert, any float dtype; norms are taken in float32.
            gates: Weight g with which the model combines it.
            experts: Expert id of the slot.
            keep: False for slots of padding tokens, which are not counted; None where there is no padding.
            weighted: Whether ``outputs`` are g f. The columns of the unweighted output then mean nothing.
        """
        norms, peaks = norms_and_peaks(outputs)
        gates = gates.float()
        counted = gates != 0 if keep is None else keep & (gates != 0)
        contributions = norms if weighted else gates.abs() * norms
        columns = torch.stack([torch.ones_like(gates), gates, norms, norms.square(), contributions], dim=-1)
        columns = torch.where(counted.unsqueeze(-1), columns, 0.0)
        peaks = torch.where(counted, peaks, 0.0)
        self.sums.index_add_(0, experts, columns.double())
        self.max_abs.scatter_reduce_(0, experts, peaks, reduce="amax")

    def add_entropy(self, weights: Float[Tensor, "tokens choices"], keep: Bool[Tensor, " tokens"] | None) -> None:
        """Add the entropy of each token's weights, as shares of the sum of their absolute values; 0 if all are 0."""
        size = weights.float().abs()
        total = size.sum(-1, keepdim=True)
        entropy = torch.special.entr(size / total).sum(-1)
        counted = total.squeeze(-1) != 0
        entropy = torch.where(counted if keep is None else keep & counted, entropy, 0.0)
        self.gate_entropy += entropy.double().sum()


def norms_and_peaks(
    outputs: Float[Tensor, "slots hidden"],
) -> tuple[Float[Tensor, " slots"], Float[Tensor, " slots"]]:
    """L2 norm and largest absolute element of every row, in float32.

    On a CPU the rows are taken in pieces that stay in its cache: memory that is written once and read once, such as a
    float32 copy of everything, would cost more than all the arithmetic here.
    """
    rows = max(1, CACHE_ELEMENTS // outputs.shape[-1]) if outputs.device.type == "cpu" else max(1, outputs.shape[0])
    norms, peaks = [], []
    for piece in outputs.split(rows):
        values = piece.float()
        norms.append(torch.linalg.vector_norm(values, dim=-1))
        peaks.append(torch.maximum(values.amax(-1), -values.amin(-1)))
    return torch.cat(norms), torch.cat(peaks)
