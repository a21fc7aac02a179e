"""linear_add_: for few tokens, the products that end in the residual stream: attention's output, a dense layer's down.

The stream grows from call to call, on which no time depends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.layers.weights import SMALL, matrix
from benchmarks.ops.bench_norm_linear import exact
from benchmarks.shapes import Scope
from pyllama.ops.linear_add import linear_add_


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for what, D in ("output", model.H * (model.V_head or model.K)), ("down", model.F):
            for T in scope.few:
                if D:
                    yield Case(name, f"{T} x {D} to {model.D}, {what}", {"T": T, "D": D, "F": model.D})


def inputs(dtype: torch.dtype, T: int, D: int, F: int) -> tuple[Any, ...]:
    """The weight is not the last: copies are made in this order, and `early` rules out a copy of it just before."""
    return matrix(dtype, F, D), torch.randn(T, D, dtype=dtype), SMALL * torch.randn(T, F, dtype=dtype)


def work(dtype: torch.dtype, T: int, D: int, F: int) -> Work:
    return Work(moved=(F * D + T * (D + 2 * F)) * dtype.itemsize, flops=2 * T * F * D, limit="read")


def pyllama(weight: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    linear_add_(residual, x, weight, early=True)
    return residual


def formula(weight: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    return residual + functional.linear(x, weight)


def eager(weight: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    return residual.addmm_(x, weight.mT)


def reference(weight: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    return residual.double() + exact(x, weight)


BENCH = Bench(
    op="linear_add_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    reference=reference,
)
