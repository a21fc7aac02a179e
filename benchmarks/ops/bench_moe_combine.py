"""moe_combine: every token's weighted sum of its experts' results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.shapes import Scope
from pyllama.ops.moe_combine import moe_combine


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.E:
                yield Case(name, f"{tokens} x {model.N} x {model.D}", {"T": tokens, "N": model.N, "D": model.D})


def inputs(dtype: torch.dtype, T: int, N: int, D: int) -> tuple[Any, ...]:
    positions = torch.randperm(T * N).int().view(T, N)
    return torch.randn(T * N, D, dtype=dtype), positions, torch.rand(T, N)


def work(dtype: torch.dtype, T: int, N: int, D: int) -> Work:
    return Work(moved=T * (N + 1) * D * dtype.itemsize + 8 * T * N, flops=2 * T * N * D, limit="copy")


def formula(x: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    return (x[positions.long()] * weights.unsqueeze(-1)).sum(1).to(x.dtype)


BENCH = Bench(
    op="moe_combine", cases=cases, inputs=inputs, work=work, pyllama=moe_combine, formula=formula, gradients=(0, 2)
)
