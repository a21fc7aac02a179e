"""norm_rope_store_: from the QKV product to queries in place and keys and values in the cache, as in prefill."""

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
from pyllama.ops.norm_rope_store import norm_rope_store_

S = 64  # page size


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if model.rank:  # latent attention has no such keys and values
            continue
        what = f"{model.H}+{model.G} heads of {model.K}" + (", normalised" if model.qk_norm else "")
        for tokens in scope.tokens:
            sizes = {"T": tokens, "H": model.H, "G": model.G, "K": model.K, "R": model.R, "norm": int(model.qk_norm)}
            yield Case(name, f"{tokens} x {what}", sizes)


def inputs(dtype: torch.dtype, T: int, H: int, G: int, K: int, R: int, norm: int) -> tuple[Any, ...]:
    qkv = torch.randn(T, (H + 2 * G) * K, dtype=dtype)
    cache = torch.zeros((T + S - 1) // S, 2, G, S, K, dtype=dtype)
    index = torch.arange(T, dtype=torch.int32)
    weights = (torch.randn(K, dtype=dtype), torch.randn(K, dtype=dtype)) if norm else (None, None)
    return qkv, cache, index, index.clone(), angles(T, R), *weights


def work(dtype: torch.dtype, T: int, H: int, G: int, K: int, R: int, norm: int) -> Work:
    moved = 2 * T * (H + 2 * G) * K * dtype.itemsize + T * (R + 2) * 4  # with the table's rows, positions and slots
    return Work(moved=moved, flops=T * (H + G) * (3 * R + 4 * K * norm), limit="copy")


def queries(qkv: Tensor, cache: Tensor) -> Tensor:
    G, K = cache.shape[2], cache.shape[4]
    return qkv[:, : qkv.shape[1] - 2 * G * K]


def pyllama(qkv: Tensor, cache: Tensor, positions: Tensor, slots: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    norm_rope_store_(qkv, cache, positions, slots, *rest, EPS)
    return queries(qkv, cache), cache


def formula(
    qkv: Tensor,
    cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """Writes the cache too, as there is no other way to store."""
    G, K = cache.shape[2], cache.shape[4]
    q, k, v = qkv.unflatten(1, (-1, K)).split((qkv.shape[1] // K - 2 * G, G, G), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = normalised(q, q_weight), normalised(k, k_weight)
    pages, places = slots // S, slots % S
    cache[pages, 0, :, places] = rotated(k, cos_sin, positions)
    cache[pages, 1, :, places] = v
    return rotated(q, cos_sin, positions).flatten(1), cache


BENCH = Bench(
    op="norm_rope_store_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
)
