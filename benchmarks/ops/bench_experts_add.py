"""experts_add_: the chosen experts' down products, weighted and added to the residual stream, for few tokens.

Plain torch and `grouped_mm` as in bench_experts_swiglu. The stream grows from call to call, on which no time depends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.layers.weights import SMALL, matrix
from benchmarks.ops.bench_experts_swiglu import by_expert, choice, distinct
from benchmarks.shapes import Scope
from pyllama.ops.experts_add import experts_add_


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for T in scope.few:
            if model.E:
                sizes = {"T": T, "N": model.N, "E": model.E, "D": model.D, "F": model.F_expert}
                yield Case(name, f"{T} x {model.N} of {model.E}, {model.F_expert} to {model.D}", sizes)


def inputs(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
    return (
        SMALL * torch.randn(T, D, dtype=dtype),
        torch.randn(T, N, F, dtype=dtype),
        matrix(dtype, E, D, F),
        choice(T, N, E),
        torch.rand(T, N).softmax(-1),
    )


def work(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> Work:
    moved = (distinct(T, N, E) * D * F + T * (N * F + 2 * D)) * dtype.itemsize + 8 * T * N
    return Work(moved=moved, flops=2 * T * N * F * D, limit="read")


def pyllama(residual: Tensor, x: Tensor, weight: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    experts_add_(residual, x, weight, indices, weights, early=True)
    return residual


def weighed(residual: Tensor, out: Tensor, weights: Tensor) -> Tensor:
    """residual + the weighted sum over a token's choices of out, [T, N, D]."""
    return residual + (out * weights.unsqueeze(-1)).sum(1).to(residual.dtype)


def formula(residual: Tensor, x: Tensor, weight: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return weighed(residual, torch.einsum("tnf,tndf->tnd", x, weight[indices.long()]), weights)


def reference(residual: Tensor, x: Tensor, weight: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    rows = zip(x.flatten(0, 1), indices.flatten().tolist(), strict=True)
    out = torch.stack([weight[e].double() @ row.double() for row, e in rows])
    return weighed(residual.double(), out.unflatten(0, indices.shape), weights)


def sorted_rows(residual: Tensor, x: Tensor, weight: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return weighed(residual, by_expert(x, weight, indices), weights)


BENCH = Bench(
    op="experts_add_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    peers={"grouped_mm": sorted_rows},
    reference=reference,
)
