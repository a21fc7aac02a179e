"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467), alone or together with the residual sum before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyllama.ops.add_rms_norm import add_rms_norm_
from pyllama.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised sum, sum) of x and the residual stream; without gradients both are written in place."""
        if residual is None:
            return self(x), x
        if torch.is_grad_enabled():
            residual = residual + x
            return self(residual), residual
        add_rms_norm_(x, residual, self.weight, self.eps)
        return x, residual
