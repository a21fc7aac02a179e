"""grouped_linear: the experts' down product, over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.ops.bench_moe_dispatch import chosen
from benchmarks.shapes import Scope
from pyllama.ops.grouped_linear import grouped_linear

LAST = 16  # rows that are compared: a reference of all would need the weights in float64
BALANCE = 100  # operations per byte read up to which memory is the limit


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.E:
                sizes = {"T": tokens, "N": model.N, "E": model.E, "D": model.F_expert, "F": model.D}
                yield Case(name, f"{tokens} x {model.N} of {model.E}, {model.F_expert} to {model.D}", sizes)


def bounds(T: int, N: int, E: int) -> Tensor:
    """int32 [E + 1]: where each expert's rows begin, for a random choice of experts."""
    counts = torch.bincount(chosen(T, N, E).flatten(), minlength=E)
    return F.pad(counts.cumsum(0), (1, 0)).int()


def inputs(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
    return torch.randn(T * N, D, dtype=dtype), torch.randn(E, F, D, dtype=dtype) / D**0.5, bounds(T, N, E)


def product_work(dtype: torch.dtype, rows: int, experts: int, D: int, F: int, out: int) -> Work:
    """The work on `rows` rows of D features for at most `experts` experts of F rows, with results of `out` columns."""
    moved = (min(rows, experts) * F * D + rows * (D + out)) * dtype.itemsize
    flops = 2 * rows * F * D
    return Work(moved=moved, flops=flops, limit="product" if flops > BALANCE * moved else "read")


def work(dtype: torch.dtype, T: int, N: int, E: int, D: int, F: int) -> Work:
    return product_work(dtype, T * N, E, D, F, F)


def formula(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A plain loop over the experts."""
    parts = x.split(offsets.diff().tolist())
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True) if len(part)])


def reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The last rows."""
    first = max(len(x) - LAST, 0)
    expert = torch.searchsorted(offsets, torch.arange(first, len(x), device=x.device), right=True) - 1
    return torch.stack([weight[e].double() @ row.double() for e, row in zip(expert, x[first:], strict=True)])


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=offsets[1:])


BENCH = Bench(
    op="grouped_linear",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=grouped_linear,
    formula=formula,
    peers={"grouped_mm": grouped_mm},
    reference=reference,
    gradients=(0, 1),
    called=("torch", "compile"),
)
