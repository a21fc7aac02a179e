"""swiglu: of the gate/up product of dense layers, and of the rows of all chosen experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.swiglu import swiglu


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.F:
                yield Case(name, f"{tokens} x {model.F}", {"rows": tokens, "F": model.F})
            if model.E:
                rows = tokens * model.N
                yield Case(
                    name, f"{tokens} tokens' experts, {rows} x {model.F_expert}", {"rows": rows, "F": model.F_expert}
                )


def inputs(dtype: torch.dtype, rows: int, F: int) -> tuple[Any, ...]:
    return (torch.randn(rows, 2 * F, dtype=dtype),)


def work(dtype: torch.dtype, rows: int, F: int) -> Work:
    return Work(moved=3 * rows * F * dtype.itemsize, flops=8 * rows * F, limit="copy")


def formula(x: Tensor) -> Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def eager(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def liger(function: Any, x: Tensor) -> Tensor:
    """It wants gate and up as tensors of their own, and copies halves of rows."""
    return function(*x.chunk(2, dim=-1))


BENCH = Bench(
    op="swiglu",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=swiglu,
    formula=formula,
    torch=eager,
    peers={
        "liger": Peer("liger_kernel.transformers.functional:liger_swiglu", liger),
        "flashinfer": Peer("flashinfer.activation:silu_and_mul", lambda function, x: function(x)),
    },
    gradients=(0,),
)
