"""Forward and backward of an op as a benchmark of its own, made of the forward's: pyllama's op beside torch's autograd.

A result serves as its own gradient, as if the loss were half the sum of squares, so that nothing but the pass is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Peer, Work


def backward_of(bench: Bench) -> Bench:
    """The benchmark of `bench.gradients`. On the GPU contenders are called, not captured: eager bodies read values.

    Gradients are compared with the formula's in float64, or, where that takes too much memory, with eager torch's.
    """
    places = bench.gradients

    def work(dtype: torch.dtype, **sizes: Any) -> Work:
        """At least twice what the forward moves; a product's gradients are two products of its size."""
        moved, flops, limit = bench.work(dtype, **sizes)
        return Work(2 * moved, 3 * flops, "product" if limit == "product" else "copy")

    def peer(other: Peer | Callable[..., Any]) -> Peer | Callable[..., Any]:
        if isinstance(other, Peer):
            return replace(other, call=differentiated(other.call, [i + 1 for i in places]))
        return differentiated(other, places)

    eager = differentiated(bench.torch or bench.formula, places)
    compiled = differentiated(torch.compile(bench.formula, dynamic=False), places)
    peers = {"compile": compiled} | {name: peer(other) for name, other in bench.peers.items()}
    return replace(
        bench,
        op=f"{bench.op} backward",
        work=work,
        pyllama=differentiated(bench.pyllama, places),
        formula=differentiated(bench.formula, places),
        torch=eager,
        peers=peers,
        reference=eager if bench.reference else None,
        right=None,
        made_of=bench.ops,
        called=("pyllama", "torch", *peers),
    )


def differentiated(function: Callable[..., Any], places: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Runs the function and its backward; gives the gradients of the arguments at these places."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        given = list(args)
        for i in places:
            given[i] = args[i].detach().requires_grad_()
        with torch.enable_grad():
            result = function(*given)
        due = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
        return torch.autograd.grad(due, [given[i] for i in places], [x.detach() for x in due])

    return run
