"""norm_swiglu: the gate and up products of dense layers with the norm before and SwiGLU after them, for few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.ops import bench_norm_linear as linear
from benchmarks.ops import bench_swiglu as swiglu
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.shapes import Scope
from pyllama.ops.norm_swiglu import norm_swiglu


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for T in scope.few:
            if model.F:
                yield Case(name, f"{T} x {model.D} to {model.F}", {"T": T, "D": model.D, "F": model.F})


def inputs(dtype: torch.dtype, T: int, D: int, F: int) -> tuple[Any, ...]:
    return linear.inputs(dtype, T, D, 2 * F)


def work(dtype: torch.dtype, T: int, D: int, F: int) -> Work:
    return Work(moved=(2 * F * D + D + T * (D + F)) * dtype.itemsize, flops=4 * T * F * D, limit="read")


def pyllama(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return norm_swiglu(x, norm, EPS, weight, early=True)


def formula(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return swiglu.formula(linear.formula(x, norm, weight))


def eager(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return swiglu.eager(linear.eager(x, norm, weight))


def reference(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return swiglu.formula(linear.reference(x, norm, weight))


def flashinfer(function: Any, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return function(linear.eager(x, norm, weight))


BENCH = Bench(
    op="norm_swiglu",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    peers={"flashinfer": Peer("flashinfer.activation:silu_and_mul", flashinfer)},
    reference=reference,
)
