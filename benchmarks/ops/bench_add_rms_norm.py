"""add_rms_norm_: the residual sum and the norm after it, over the hidden size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as normalised
from benchmarks.shapes import Scope
from pyllama.ops.add_rms_norm import add_rms_norm_

Both = tuple[Tensor, Tensor]  # the normalised sum, and the sum


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            yield Case(name, f"{tokens} x {model.D}", {"rows": tokens, "D": model.D})


def inputs(dtype: torch.dtype, rows: int, D: int) -> tuple[Any, ...]:
    return torch.randn(rows, D, dtype=dtype), torch.randn(rows, D, dtype=dtype), torch.randn(D, dtype=dtype)


def work(dtype: torch.dtype, rows: int, D: int) -> Work:
    return Work(moved=(4 * rows * D + D) * dtype.itemsize, flops=5 * rows * D, limit="copy")


def pyllama(x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    add_rms_norm_(x, residual, weight, EPS)
    return x, residual


def formula(x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    total = residual + x
    return normalised(total, weight), total


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    total = residual + x
    return F.rms_norm(total, weight.shape, weight, EPS), total


def flashinfer(function: Any, x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    function(x, residual, weight, EPS)
    return x, residual


def liger(function: Any, x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    return function(x, residual, weight, EPS)


def quack(function: Any, x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    return function(x, weight, residual=residual, eps=EPS, prenorm=True)


BENCH = Bench(
    op="add_rms_norm_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    peers={
        "liger": Peer("liger_kernel.transformers.functional:liger_fused_add_rms_norm", liger),
        "flashinfer": Peer("flashinfer.norm:fused_add_rmsnorm", flashinfer),
        "quack": Peer("quack:rmsnorm", quack),
    },
)
