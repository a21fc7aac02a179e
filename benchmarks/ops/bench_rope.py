"""rope: over the query heads of each token, pairs half a head apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.rope import rope


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        K = model.R if model.rank else model.K  # latent attention rotates heads of their own
        part = "" if model.R == K else f", {model.R} rotated"
        for tokens in scope.tokens:
            sizes = {"T": tokens, "heads": model.H, "K": K, "R": model.R}
            yield Case(name, f"{tokens} x {model.H} heads of {K}{part}", sizes)


def inputs(dtype: torch.dtype, T: int, heads: int, K: int, R: int) -> tuple[Any, ...]:
    return torch.randn(T, heads, K, dtype=dtype), angles(T, R), torch.arange(T, dtype=torch.int32)


def angles(positions: int, R: int) -> Tensor:
    """A table of cosines and sines, float32 [positions, R]."""
    turns = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(0, R, 2) / R)
    return torch.cat((turns.cos(), turns.sin()), dim=-1)


def work(dtype: torch.dtype, T: int, heads: int, K: int, R: int) -> Work:
    moved = 2 * T * heads * K * dtype.itemsize + T * (R + 1) * 4  # with the table's rows and the positions
    return Work(moved=moved, flops=3 * T * heads * R, limit="copy")


def formula(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    R = cos_sin.shape[-1]
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    a, b = x[..., :R].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., R:]), dim=-1)


def flashinfer(function: Any, x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """It turns keys too: given one head."""
    return function(positions, x.flatten(1), x[:, 0], x.shape[-1], cos_sin)[0].view_as(x)


BENCH = Bench(
    op="rope",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=rope,
    formula=formula,
    peers={"flashinfer": Peer("flashinfer.rope:apply_rope_with_cos_sin_cache", flashinfer)},
    gradients=(0,),
)
