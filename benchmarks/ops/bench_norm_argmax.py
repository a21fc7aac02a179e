"""norm_argmax: for few tokens, the last norm, the head and the greedy choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import TOLERANCE, Bench, Case, Peer, Work
from benchmarks.layers.weights import around_1, matrix
from benchmarks.ops import bench_norm_linear as linear
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.shapes import Scope
from pyllama.ops.norm_argmax import norm_argmax_


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for T in scope.few:
            yield Case(name, f"{T} x {model.D} to {model.V}", {"T": T, "D": model.D, "V": model.V})


def inputs(dtype: torch.dtype, T: int, D: int, V: int) -> tuple[Any, ...]:
    """Tokens to write, tokens' features, weights of norm and head, and what counts blocks."""
    tokens, counters = torch.zeros(T, dtype=torch.int64), torch.zeros(2 * T + 1, dtype=torch.int32)
    return tokens, torch.randn(T, D, dtype=dtype), around_1(dtype, D), matrix(dtype, V, D), counters


def work(dtype: torch.dtype, T: int, D: int, V: int) -> Work:
    return Work(moved=(V * D + D + T * D) * dtype.itemsize + 8 * T, flops=2 * T * V * D, limit="read")


def pyllama(tokens: Tensor, x: Tensor, norm: Tensor, head: Tensor, counters: Tensor) -> Tensor:
    norm_argmax_(tokens, x, norm, EPS, head, counters, early=True)
    return tokens


def formula(tokens: Tensor, x: Tensor, norm: Tensor, head: Tensor, counters: Tensor) -> Tensor:
    return linear.formula(x, norm, head).argmax(-1)


def eager(tokens: Tensor, x: Tensor, norm: Tensor, head: Tensor, counters: Tensor) -> Tensor:
    return linear.eager(x, norm, head).argmax(-1)


def flashinfer(function: Any, tokens: Tensor, x: Tensor, norm: Tensor, head: Tensor, counters: Tensor) -> Tensor:
    return linear.flashinfer(function, x, norm, head).argmax(-1)


def right(result: Tensor, tokens: Tensor, x: Tensor, norm: Tensor, head: Tensor, counters: Tensor) -> Tensor:
    """Whether each token's logit is as large as the largest; rounding may swap those that are close."""
    logits = linear.reference(x, norm, head)
    largest = logits.max(-1).values
    return (largest - logits.gather(1, result[:, None])[:, 0]) / largest.abs() <= TOLERANCE[x.dtype]


BENCH = Bench(
    op="norm_argmax_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    peers={"flashinfer": Peer("flashinfer.norm:rmsnorm", flashinfer)},
    right=right,
)
