"""mla_rope_store_: latent attention's queries in place and its entries in the cache, as in prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rms_norm import formula as normalised
from benchmarks.ops.bench_rope import angles
from benchmarks.ops.bench_rope import formula as rotated
from benchmarks.shapes import Scope
from pyllama.ops.mla_rope_store import mla_rope_store_

S = 64  # page size


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        for tokens in scope.tokens:
            if model.rank:
                sizes = {"T": tokens, "H": model.H, "K": model.K, "rank": model.rank, "R": model.R}
                yield Case(name, f"{tokens} x {model.H} heads of {model.K}, entries of {model.rank + model.R}", sizes)


def inputs(dtype: torch.dtype, T: int, H: int, K: int, rank: int, R: int) -> tuple[Any, ...]:
    index = torch.arange(T, dtype=torch.int32)
    cache = torch.zeros((T + S - 1) // S, S, rank + R, dtype=dtype)
    q, latent = torch.randn(T, H, K, dtype=dtype), torch.randn(T, rank + R, dtype=dtype)
    return q, latent, cache, torch.randn(rank, dtype=dtype), index, index.clone(), angles(T, R)


def work(dtype: torch.dtype, T: int, H: int, K: int, rank: int, R: int) -> Work:
    moved = 2 * T * (H * R + rank + R) * dtype.itemsize + T * (R + 2) * 4  # with the table's rows, positions and slots
    return Work(moved=moved, flops=T * (3 * (H + 1) * R + 4 * rank), limit="copy")


def pyllama(q: Tensor, latent: Tensor, cache: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    mla_rope_store_(q, latent, cache, *rest, EPS)
    return q, cache


def formula(
    q: Tensor, latent: Tensor, cache: Tensor, weight: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the cache too, as there is no other way to store."""
    R = cos_sin.shape[1]
    key = rotated(latent[:, None, -R:].contiguous(), cos_sin, positions)[:, 0]
    cache[slots // S, slots % S] = torch.cat((normalised(latent[:, :-R], weight), key), dim=1)
    return torch.cat((q[..., :-R], rotated(q[..., -R:].contiguous(), cos_sin, positions)), dim=-1), cache


BENCH = Bench(op="mla_rope_store_", cases=cases, inputs=inputs, work=work, pyllama=pyllama, formula=formula)
