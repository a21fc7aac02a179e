"""embedding: the rows of a step's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.shapes import Scope
from pyllama.ops.embedding import embedding


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            yield Case(name, f"{tokens} of {model.V} x {model.D}", {"T": tokens, "V": model.V, "D": model.D})


def inputs(dtype: torch.dtype, T: int, V: int, D: int) -> tuple[Any, ...]:
    return torch.randn(V, D, dtype=dtype), torch.randint(0, V, (T,))


def work(dtype: torch.dtype, T: int, V: int, D: int) -> Work:
    return Work(moved=2 * T * D * dtype.itemsize + 8 * T, flops=0, limit="copy")


def formula(weight: Tensor, token_ids: Tensor) -> Tensor:
    return F.embedding(token_ids, weight)


BENCH = Bench(op="embedding", cases=cases, inputs=inputs, work=work, pyllama=embedding, formula=formula)
