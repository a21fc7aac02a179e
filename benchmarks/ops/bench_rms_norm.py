"""rms_norm: over the hidden size, and over each query head (64 or 128 wide) where a model normalises those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.rms_norm import rms_norm

EPS = 1e-5


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            yield Case(name, f"{tokens} x {model.D}", {"rows": tokens, "D": model.D})
            if model.qk_norm:
                rows = tokens * model.H
                yield Case(name, f"query heads, {rows} x {model.K}", {"rows": rows, "D": model.K})


def inputs(dtype: torch.dtype, rows: int, D: int) -> tuple[Any, ...]:
    return torch.randn(rows, D, dtype=dtype), torch.randn(D, dtype=dtype)


def work(dtype: torch.dtype, rows: int, D: int) -> Work:
    return Work(moved=(2 * rows * D + D) * dtype.itemsize, flops=4 * rows * D, limit="copy")


def formula(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def library(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    return function(x, weight, eps=EPS)


BENCH = Bench(
    op="rms_norm",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=lambda x, weight: rms_norm(x, weight, EPS),
    formula=formula,
    torch=lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    peers={
        "liger": Peer("liger_kernel.transformers.functional:liger_rms_norm", library),
        "flashinfer": Peer("flashinfer.norm:rmsnorm", library),
        "quack": Peer("quack:rmsnorm", library),
    },
    gradients=(0, 1),
)
