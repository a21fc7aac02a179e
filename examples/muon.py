"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised, for matrices.

torch.optim.Muon takes matrices only; here a parameter may also be a stack of them [E, rows, columns], as a layer's
experts are, each orthogonalised by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic whose iteration drives all singular values near 1 the fastest (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition, [..., rows, columns] (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    params: floating-point tensors of two or more dimensions; lr: the spectral norm of a square matrix's step;
    momentum: of the exponential average of gradients; weight_decay: as in AdamW, times lr.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - momentum)
                update = orthogonalize(parameter.grad.lerp(average, momentum))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
