"""experts_swiglu: the chosen experts' gate and up products with SwiGLU, for few tokens.

Plain torch gathers the chosen experts' weights, which torch.compile can do while it multiplies. Beside it rows sorted
by expert, for `grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.layers.weights import matrix
from benchmarks.ops.bench_grouped_linear import grouped_mm
from benchmarks.ops.bench_grouped_swiglu import gated
from benchmarks.shapes import Scope
from pyllama.ops.experts_swiglu import experts_swiglu


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for T in scope.few:
            if model.E:
                sizes = {"T": T, "N": model.N, "E": model.E, "D": model.D, "F": model.F_expert}
                yield Case(name, f"{T} x {model.N} of {model.E}, {model.D} to {model.F_expert}", sizes)


@cache
def drawn(T: int, N: int, E: int) -> list[list[int]]:
    """Different experts of each token, at random, but always the same."""
    random = Random(0)
    return [random.sample(range(E), N) for _ in range(T)]


def distinct(T: int, N: int, E: int) -> int:
    """How many experts are drawn, whose weights must be read."""
    return len({expert for of_token in drawn(T, N, E) for expert in of_token})


def choice(T: int, N: int, E: int) -> Tensor:
    return torch.tensor(drawn(T, N, E), dtype=torch.int32)


def inputs(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
    return torch.randn(T, D, dtype=dtype), matrix(dtype, E, 2 * F, D), choice(T, N, E)


def work(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> Work:
    moved = (distinct(T, N, E) * 2 * F * D + T * (D + N * F)) * dtype.itemsize + 4 * T * N
    return Work(moved=moved, flops=4 * T * N * F * D, limit="read")


def formula(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return gated(torch.einsum("td,tnfd->tnf", x, weight[indices.long()]))


def reference(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([gated(weight[e].double() @ row.double()) for e in of_token])
            for row, of_token in zip(x, indices.tolist(), strict=True)
        ]
    )


def by_expert(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Each choice's row, [T, N, D], times its expert's weight: rows sorted, for grouped_mm."""
    experts, order = indices.flatten().sort(stable=True)
    bounds = torch.arange(len(weight) + 1, dtype=torch.int32, device=x.device)
    out = grouped_mm(x.flatten(0, 1)[order], weight, torch.searchsorted(experts, bounds, out_int32=True))
    return out[order.argsort()].unflatten(0, indices.shape)


def sorted_rows(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return gated(by_expert(x.unsqueeze(1).expand(-1, indices.shape[1], -1), weight, indices))


BENCH = Bench(
    op="experts_swiglu",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=experts_swiglu,
    formula=formula,
    peers={"grouped_mm": sorted_rows},
    reference=reference,
)
