"""moe_dispatch: the sort of (token, choice) pairs by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.shapes import Scope
from pyllama.ops.moe_dispatch import moe_dispatch


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.E:
                yield Case(name, f"{tokens} x {model.N} of {model.E}", {"T": tokens, "N": model.N, "E": model.E})


def chosen(T: int, N: int, E: int) -> Tensor:
    """int32 [T, N]: different experts of each token, at random."""
    return torch.rand(T, E).topk(N, dim=-1).indices.int()


def inputs(dtype: torch.dtype, T: int, N: int, E: int) -> tuple[Any, ...]:
    return chosen(T, N, E), E


def work(dtype: torch.dtype, T: int, N: int, E: int) -> Work:
    return Work(moved=4 * (3 * T * N + E + 1), flops=0, limit="copy")


def formula(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts, order = indices.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=indices.device)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=indices.device)
    return (
        (order // indices.shape[1]).int(),
        torch.searchsorted(experts, bounds, out_int32=True),
        positions.int().view_as(indices),
    )


def right(result: tuple[Tensor, ...], indices: Tensor, num_experts: int) -> Tensor:
    expected = formula(indices, num_experts)
    return torch.cat([(got == wanted).flatten() for got, wanted in zip(result, expected, strict=True)])


BENCH = Bench(
    op="moe_dispatch", cases=cases, inputs=inputs, work=work, pyllama=moe_dispatch, formula=formula, right=right
)
