"""Running sums of one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeprune.calibrate.experts.seen import Seen
from moeprune.calibrate.quantities import NUM_BINS

CACHE_ELEMENTS = 131_072
DEVICE_ELEMENTS = 1 << 26  # 256 MiB in float32
MAX_RANKS = 64
SUM_COLUMNS = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "gated_norm_sq_sum")

Arrays = dict[str, Tensor]
Visit = Callable[[slice, Float[Tensor, "rows hidden"]], None]


class LayerAccumulator:
    """Running sums of one layer over the tokens of one domain, in float64 on the layer's device.

    What :data:`moeprune.calibrate.quantities.Quantity.halved` is kept for the even and the odd rows of the text apart,
    one after the other; without rows everything is even.
    """

    def __init__(self, num_experts: int, device: torch.device):
        self.num_experts = num_experts
        self.sums = torch.zeros(2 * num_experts, len(SUM_COLUMNS), dtype=torch.float64, device=device)
        self.token_gated = self.sums.new_zeros(2 * num_experts)
        self.max_abs = torch.zeros(2 * num_experts, dtype=torch.float32, device=device)
        self.gate_entropy = self.sums.new_zeros(())
        self.margin = self.sums.new_zeros(())
        self.rank_gates = self.sums.new_zeros(0)
        self.ratios = self.sums.new_zeros(0, NUM_BINS)
        self.tokens = self.sums.new_zeros(2)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        seen: Seen,
        keep: Bool[Tensor, " tokens"] | None,
        odd: Bool[Tensor, " tokens"] | None,
        *,
        visit: Visit | None = None,
    ) -> Bool[Tensor, " slots"]:
        """Add routed slots (a slot is one token at one of its experts). Norms are taken in float32.

        A slot of weight 0 adds nothing to the model's result and is not counted: that is how zaya's router marks a
        token that skips its experts.

        Args:
            seen: The call.
            keep: False for padding tokens, which are not counted; None where there is no padding.
            odd: True for tokens of odd rows; None where rows are not told apart.
            visit: Given the outputs in float32, a piece after the other, while they are in the cache.

        Returns:
            Which slots were counted.
        """
        norms, peaks = norms_and_peaks(seen.outputs, visit)
        gates = seen.gates.float()
        counted = gates != 0 if keep is None else keep[seen.tokens] & (gates != 0)
        at = seen.experts if odd is None else seen.experts + self.num_experts * odd[seen.tokens]
        contributions = norms if seen.weighted else gates.abs() * norms
        columns = torch.stack(
            [torch.ones_like(gates), gates, norms, norms.square(), contributions, contributions.square()], dim=-1
        )
        columns = torch.where(counted.unsqueeze(-1), columns, 0.0)
        self.sums.index_add_(0, at, columns.double())
        self.max_abs.scatter_reduce_(0, at, torch.where(counted, peaks, 0.0), reduce="amax")
        self._latest = at, seen.tokens, columns[:, SUM_COLUMNS.index("gated_norm_sum")]
        return counted

    def add_tokens(
        self,
        weights: Float[Tensor, "tokens choices"],
        keep: Bool[Tensor, " tokens"] | None,
        odd: Bool[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add what each token's weights say, as shares of the sum of their absolute values; nothing if all are 0."""
        size = weights.float().abs()
        if size.shape[-1] <= MAX_RANKS:
            size = size.sort(dim=-1, descending=True).values
        else:
            size = size.topk(MAX_RANKS, dim=-1).values
        total = size.sum(-1, keepdim=True)
        counted = total != 0 if keep is None else keep.unsqueeze(-1) & (total != 0)
        shares = torch.where(counted, size / total, 0.0)
        self.gate_entropy += torch.special.entr(shares).sum(dtype=torch.float64)
        ranks = size.shape[-1]
        if not self.rank_gates.numel():
            self.rank_gates, self.ratios = self.sums.new_zeros(ranks), self.sums.new_zeros(ranks, NUM_BINS)
        self.rank_gates += shares.sum(0, dtype=torch.float64)
        ratios = torch.where(counted, size / size[:, :1], 0.0)
        bins = (ratios * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        bins += torch.arange(0, ranks * NUM_BINS, NUM_BINS, device=bins.device)
        self.ratios.view(-1).index_add_(0, bins.view(-1), counted.expand_as(bins).reshape(-1).double())
        present = torch.ones_like(counted[:, 0]) if keep is None else keep
        odds = torch.zeros((), dtype=torch.float64, device=present.device) if odd is None else (present & odd).sum()
        self.tokens += torch.stack([present.sum() - odds, odds])

    def add_margin(
        self,
        logits: Float[Tensor, "tokens experts"],
        chosen: Bool[Tensor, "tokens experts"],
        keep: Bool[Tensor, " tokens"] | None,
    ) -> None:
        """Add the gap between the worst chosen and the best other logit; nothing for tokens with no such pair."""
        worst = logits.masked_fill(~chosen, torch.inf).amin(-1)
        best_other = logits.masked_fill(chosen, -torch.inf).amax(-1)
        counted = chosen.any(-1) & ~chosen.all(-1)
        margins = torch.where(counted if keep is None else keep & counted, worst - best_other, 0.0)
        self.margin += margins.sum(dtype=torch.float64)

    def add_token_weighted(self, turns: Float[Tensor, " tokens"]) -> None:
        """Add the contributions of the latest call again, each times ``turns`` of its token (float64)."""
        assert self._latest is not None
        at, tokens, contributions = self._latest
        turned = torch.where(contributions != 0, turns[tokens] * contributions, 0.0)
        self.token_gated.index_add_(0, at, turned)

    def halved(self) -> Arrays:
        """What is kept apart for even and odd rows, each (2, experts)."""
        arrays = {name: self.sums[:, column] for column, name in enumerate(SUM_COLUMNS)}
        arrays |= {"token_gated_norm_sum": self.token_gated, "max_abs": self.max_abs.double()}
        return {name: array.view(2, -1) for name, array in arrays.items()}

    def whole(self) -> Arrays:
        """Everything else."""
        return {
            "gate_entropy_sum": self.gate_entropy,
            "margin_sum": self.margin,
            "rank_gate_sum": self.rank_gates,
            "gate_ratio_count": self.ratios,
        }


def chosen_experts(seen: Seen, num_experts: int) -> Bool[Tensor, "tokens experts"]:
    """Which experts each token was routed to with a weight other than 0."""
    chosen = torch.zeros(seen.weights.shape[0] * num_experts, dtype=torch.bool, device=seen.gates.device)
    chosen[seen.tokens * num_experts + seen.experts] = seen.gates != 0
    return chosen.view(-1, num_experts)


def norms_and_peaks(
    outputs: Float[Tensor, "slots hidden"], visit: Visit | None = None
) -> tuple[Float[Tensor, " slots"], Float[Tensor, " slots"]]:
    """L2 norm and largest absolute element of every row, in float32.

    Rows are taken in pieces: on a CPU such as stay in its cache, because memory that is written once and read once,
    such as a float32 copy of everything, would cost more than all the arithmetic here. A GPU widens values as it reads
    them and needs no copy, unless there is a ``visit``.
    """
    norms, peaks = [], []
    for rows in pieces(outputs):
        values = outputs[rows]
        if visit is not None or values.device.type == "cpu":
            values = values.float()
        norms.append(torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32))
        peaks.append(torch.maximum(values.amax(-1), -values.amin(-1)).float())
        if visit is not None:
            visit(rows, values)
    return torch.cat(norms), torch.cat(peaks)


def pieces(values: Tensor) -> list[slice]:
    """The rows of ``values`` in pieces that fit a CPU's cache, or that bound what copies of them take on a GPU."""
    total = values.shape[0]
    step = max(1, (CACHE_ELEMENTS if values.device.type == "cpu" else DEVICE_ELEMENTS) // values.shape[-1])
    return [slice(begin, min(begin + step, total)) for begin in range(0, max(total, 1), step)]


def turn(residual: Float[Tensor, "tokens hidden"], added: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    """``1 - cos(x, x + y)`` of every token, float64: how far y turns x.

    The difference of two numbers near 1 would lose what matters. With a = x x, b = x y, c = y y the squared sine is
    (a c - b^2) / (a |x + y|^2), and 1 - cos is the squared sine over 1 + cos.

    Args:
        residual: x, any float dtype.
        added: y, likewise.

    Returns:
        Between 0 and 2; 0 where x or x + y is 0.
    """
    products = []
    for rows in pieces(residual):
        x, y = residual[rows].float(), added[rows].float()
        products.append(torch.stack([(x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)]))
    a, b, c = torch.cat(products, dim=-1).double()
    after = (a + 2 * b + c).clamp(min=0)
    size = (a * after).sqrt()
    cosine = ((a + b) / size).clamp(-1, 1)
    squared_sine = ((a * c - b * b).clamp(min=0) / (a * after)).clamp(max=1)
    turned = torch.where(cosine > 0, squared_sine / (1 + cosine), 1 - cosine)
    return torch.where(size == 0, 0.0, turned)


def rows_of(values: Tensor, tokens: int) -> Int[Tensor, " tokens"] | Tensor:
    """``values`` as one row a token; several rows of one token, expert after expert, are added up."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if flat.shape[0] == tokens else flat.view(-1, tokens, flat.shape[-1]).sum(0)
