"""Layers without memory, and tensors in the place of their parameters: all contenders have the same, without copies."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@cache
def skeleton(kind: type[nn.Module], *args: Any) -> nn.Module:
    """kind(*args) on the meta device."""
    with torch.device("meta"):
        return kind(*args).eval()


def matrix(dtype: torch.dtype, *shape: int) -> Tensor:
    """A weight whose products are as large as what they are given."""
    return torch.empty(shape, dtype=dtype).normal_(std=shape[-1] ** -0.5)


def call(layer: nn.Module, weights: dict[str, Tensor | None], *args: Any, **options: Any) -> Any:
    """What the layer gives with these weights, by name; it has none of that name where there is None."""
    return functional_call(layer, {name: t for name, t in weights.items() if t is not None}, args, options)
