"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyllama.ops.registry import cast
from pyllama.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._is_any_autocast_enabled():  # which rounds what products give, but not the weight
            return cast(rms_norm(cast(x, self.weight.dtype), self.weight, self.eps), x.dtype)
        return rms_norm(x, self.weight, self.eps)
