"""All experts on a sample of tokens: how alike their outputs are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 2**24

Run = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "experts tokens hidden"]]


class SampleAccumulator:
    """Running sums of one layer over the sampled tokens, in float64 on its device.

    Products are taken in float32 over as many tokens as give :data:`CHUNK_ELEMENTS` outputs, which bounds the memory.
    """

    def __init__(self, num_experts: int, device: torch.device):
        self.tokens = 0
        self.gram = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        self.cosines = torch.zeros_like(self.gram)
        self.output_sum: Tensor | None = None

    def add(self, inputs: Float[Tensor, "tokens hidden"], run: Run) -> None:
        """Run every expert on every token and add what they give.

        Args:
            inputs: Inputs of the layer's experts.
            run: Runs all experts, weights of 1.
        """
        experts = len(self.gram)
        for part in inputs.split(max(1, CHUNK_ELEMENTS // (experts * inputs.shape[-1]))):
            outputs = run(part).float()
            total = outputs.sum(1, dtype=torch.float64)
            self.output_sum = total if self.output_sum is None else self.output_sum.add_(total)
            flat = outputs.reshape(experts, -1)
            self.gram += (flat @ flat.t()).double()
            norms = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
            unit = torch.where(norms > 0, outputs / norms, 0.0).reshape(experts, -1)
            self.cosines += (unit @ unit.t()).double()
            self.tokens += part.shape[0]

    def whole(self) -> dict[str, Tensor]:
        """The sums by name."""
        tokens = torch.tensor(float(self.tokens), dtype=torch.float64)
        arrays = {"sampled_tokens": tokens, "sampled_output_gram": self.gram}
        arrays["sampled_output_cosine_sum"] = self.cosines
        return arrays if self.output_sum is None else arrays | {"sampled_output_sum": self.output_sum}
