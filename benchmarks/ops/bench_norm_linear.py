"""norm_linear: for few tokens, the products that attention begins with (queries, keys and values, or latents), and the
head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.layers.weights import around_1, matrix
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as rms_norm
from benchmarks.shapes import Scope
from pyllama.ops.norm_linear import norm_linear

ROWS = 4096  # of a weight that are in float64 at a time


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        heads = ("latents", model.q_rank + model.rank + model.R)
        for what, F in (heads if model.rank else ("qkv", (model.H + 2 * model.G) * model.K)), ("head", model.V):
            for T in scope.few:
                yield Case(name, f"{T} x {model.D} to {F}, {what}", {"T": T, "D": model.D, "F": F})


def inputs(dtype: torch.dtype, T: int, D: int, F: int) -> tuple[Any, ...]:
    return torch.randn(T, D, dtype=dtype), around_1(dtype, D), matrix(dtype, F, D)


def work(dtype: torch.dtype, T: int, D: int, F: int) -> Work:
    return Work(moved=(F * D + D + T * (D + F)) * dtype.itemsize, flops=2 * T * F * D, limit="read")


def pyllama(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return norm_linear(x, norm, EPS, weight, early=True)


def formula(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(rms_norm(x, norm), weight)


def eager(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(functional.rms_norm(x, norm.shape, norm, EPS), weight)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float64, without the whole weight in float64."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(ROWS)], dim=1)


def reference(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return exact(rms_norm(x.double(), norm.double()), weight)


def flashinfer(function: Any, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(function(x, norm, eps=EPS), weight)


BENCH = Bench(
    op="norm_linear",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    peers={"flashinfer": Peer("flashinfer.norm:rmsnorm", flashinfer)},
    reference=reference,
)
