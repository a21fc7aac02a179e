"""topk_gate: the routers of real models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.shapes import Scope
from pyllama.ops.topk_gate import topk_gate


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.E:
                yield Case(name, f"{tokens} x {model.N} of {model.E}", {"T": tokens, "E": model.E, "N": model.N})


def inputs(dtype: torch.dtype, T: int, E: int, N: int) -> tuple[Any, ...]:
    """A token's logits are all different, also in bfloat16, so that there is one choice: the gradient's place."""
    levels = torch.arange(E, dtype=dtype) * (8 / E) - 4
    return levels[torch.rand(T, E).argsort(-1)], N


def work(dtype: torch.dtype, T: int, E: int, N: int) -> Work:
    return Work(moved=T * (E * dtype.itemsize + N * 8), flops=0, limit="read")


def formula(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, indices = scores.topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), indices.int()


def right(result: tuple[Tensor, Tensor], logits: Tensor, top_k: int) -> Tensor:
    """The weights, in order."""
    expected, _ = formula(logits.double(), top_k)
    return (result[0].double() - expected).abs() < 1e-4


def vllm(function: Any, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights = torch.empty(len(logits), top_k, dtype=torch.float32, device=logits.device)
    indices, tokens = torch.empty_like(weights, dtype=torch.int32), torch.empty_like(weights, dtype=torch.int32)
    function(weights, indices, tokens, logits.float(), True)
    return weights, indices


BENCH = Bench(
    op="topk_gate",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=topk_gate,
    formula=formula,
    peers={"vllm": Peer("vllm._custom_ops:topk_softmax", vllm)},
    right=right,
    gradients=(0,),
)
