"""The Muon optimiser (Jordan et al., 2024) for stacks of matrices: momentum, orthogonalised, as the update.

It needs clearly fewer tokens than AdamW for the same loss, and tokens are what a CPU is short of. The update is scaled
as in Moonlight (Liu et al., 2025), so that it takes AdamW's learning rate and weight decay.
"""

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices):
    """Replaces the singular values of each matrix by values near one, with a quintic Newton-Schulz iteration.

    Args:
        matrices: float tensor [..., rows, columns].

    Returns:
        Tensor of the same shape in bfloat16, which is all the precision that the iteration needs.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters of two or more dimensions.

    A parameter of three dimensions is a stack of matrices (one for each expert), each orthogonalised by itself.
    """

    def __init__(self, params, *, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the parameters from their gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]))
                # 0.2 * sqrt(longer side) gives the update the root mean square that AdamW's has
                scale = 0.2 * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
