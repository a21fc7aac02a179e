"""Layers without memory, and tensors in the place of their parameters: all contenders have the same, without copies.

Every layer is measured as pyllama's models call it: x + layer(rms_norm(x)).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.ops.bench_rms_norm import EPS
from pyllama.layers.norm import RMSNorm

SMALL = 1 / 64  # of a residual stream, so that a comparison of sums is one of what was added; norms make it 1


class Normed(nn.Module):
    """A layer, and the norm before it."""

    def __init__(self, kind: type[nn.Module], config: Any, hidden_size: int, *args: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, EPS)
        self.layer = kind(config, hidden_size, *args)

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.layer(x, self.norm, *args)


@cache
def skeleton(kind: type[nn.Module], *args: Any) -> nn.Module:
    """kind(*args) on the meta device."""
    with torch.device("meta"):
        return kind(*args).eval()


def matrix(dtype: torch.dtype, *shape: int) -> Tensor:
    """A weight whose products are as large as what they are given."""
    return torch.empty(shape, dtype=dtype).normal_(std=shape[-1] ** -0.5)


def around_1(dtype: torch.dtype, size: int) -> Tensor:
    """A norm's weight."""
    return torch.rand(size, dtype=dtype) + 0.5


def call(layer: nn.Module, weights: dict[str, Tensor | None], *args: Any, **options: Any) -> Any:
    """What the layer gives with these weights, by name; it has none of that name where there is None."""
    return functional_call(layer, {name: t for name, t in weights.items() if t is not None}, args, options)
