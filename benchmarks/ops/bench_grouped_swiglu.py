"""grouped_swiglu: the experts' gate and up products with SwiGLU, of rows gathered from the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.ops import bench_grouped_linear as linear
from benchmarks.ops.bench_moe_dispatch import chosen
from benchmarks.shapes import Scope
from pyllama.ops.grouped_swiglu import grouped_swiglu


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.E:
                sizes = {"T": tokens, "N": model.N, "E": model.E, "D": model.D, "F": model.F_expert}
                yield Case(name, f"{tokens} x {model.N} of {model.E}, {model.D} to {model.F_expert}", sizes)


def inputs(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
    experts, order = chosen(T, N, E).flatten().sort(stable=True)
    offsets = torch.searchsorted(experts, torch.arange(E + 1, dtype=torch.int32), out_int32=True)
    weight = torch.randn(E, 2 * F, D, dtype=dtype) / D**0.5
    return torch.randn(T, D, dtype=dtype), weight, offsets, (order // N).int()


def work(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> Work:
    return linear.product_work(dtype, T * N, E, D, 2 * F, F)


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def formula(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """A plain loop over the experts."""
    return gated(linear.formula(x[rows], weight, offsets))


def reference(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    return gated(linear.reference(x[rows], weight, offsets))


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    return gated(linear.grouped_mm(x[rows], weight, offsets))


BENCH = Bench(
    op="grouped_swiglu",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=grouped_swiglu,
    formula=formula,
    peers={"grouped_mm": grouped_mm},
    reference=reference,
    gradients=(0, 1),
    called=("torch", "compile"),
)
