"""decode_attention_: from the QKV product of one token a sequence to attention's result, over caches of some length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.ops.bench_attention import LAST, causal_flops, explicit
from benchmarks.ops.bench_norm_rope_store import formula as stored
from benchmarks.ops.bench_norm_rope_store import queries
from benchmarks.ops.bench_paged_attention import S, gathered, sdpa
from benchmarks.ops.bench_rms_norm import EPS
from benchmarks.ops.bench_rope import angles
from benchmarks.shapes import Scope
from pyllama.ops.decode_attention import decode_attention_


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if model.rank:  # latent attention has its own op
            continue
        heads = {"H": model.H, "G": model.G, "K": model.K, "R": model.R, "norm": int(model.qk_norm)}
        what = f"{model.H}/{model.G} heads of {model.K}" + (", normalised" if model.qk_norm else "")
        for B in scope.batches:
            for m in scope.contexts:
                yield Case(name, f"{B} x {m}, {what}", {"B": B, "m": m, **heads})


def inputs(dtype: torch.dtype, B: int, m: int, H: int, G: int, K: int, R: int, norm: int) -> tuple[Any, ...]:
    """The product, a cache with a place for its token at the end, its block table and lengths, the token's slots."""
    assert m % S == 0, "so that sequences fill their pages"
    pages = m // S
    block_table = torch.randperm(B * pages).to(torch.int32).view(B, pages)
    weights = (torch.randn(K, dtype=dtype), torch.randn(K, dtype=dtype)) if norm else (None, None)
    return (
        torch.randn(B, (H + 2 * G) * K, dtype=dtype),
        torch.randn(B * pages, 2, G, S, K, dtype=dtype),
        block_table,
        torch.full((B,), m, dtype=torch.int32),
        torch.full((B,), m - 1, dtype=torch.int32),
        block_table[:, -1] * S + S - 1,
        torch.zeros(B * G, dtype=torch.int32),
        angles(m, R),
        *weights,
    )


def work(dtype: torch.dtype, B: int, m: int, H: int, G: int, K: int, R: int, norm: int) -> Work:
    moved = (2 * B * m * G + B * (2 * H + 2 * G)) * K * dtype.itemsize
    return Work(moved=moved, flops=B * causal_flops(1, m, H, K, K), limit="read")


def pyllama(
    qkv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    slots: Tensor,
    counters: Tensor,
    cos_sin: Tensor,
    *weights: Tensor | None,
) -> Tensor:
    decode_attention_(qkv, kv_cache, block_table, lengths, positions, cos_sin, *weights, eps=EPS, counters=counters)
    return queries(qkv, kv_cache)


def composed(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    slots: Tensor,
    counters: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    """Step by step: `attend` has the queries [B, H, K] and the gathered keys and values. Writes the cache, as there is
    no other way to store."""
    q, _ = stored(qkv, kv_cache, positions, slots, *rest)
    return attend(q.unflatten(1, (-1, kv_cache.shape[4])), *gathered(kv_cache, block_table)).flatten(1)


def formula(*inputs: Any) -> Tensor:
    return composed(lambda q, k, v: explicit(q[:, None], k, v), *inputs)


def eager(*inputs: Any) -> Tensor:
    """With torch's attention."""
    return composed(sdpa, *inputs)


def reference(
    qkv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    slots: Tensor,
    counters: Tensor,
    *rest: Tensor | None,
) -> Tensor:
    """The last sequences."""
    pages = block_table[-LAST:]
    moved = torch.arange(pages.numel(), dtype=torch.int32, device=pages.device).view(pages.shape)
    cache, places = kv_cache[pages.flatten().long()].double(), moved[:, -1] * S + S - 1
    wide = [None if tensor is None else tensor.double() for tensor in rest]
    return formula(qkv[-LAST:].double(), cache, moved, lengths, positions[-LAST:], places, counters, *wide)


BENCH = Bench(
    op="decode_attention_",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=pyllama,
    formula=formula,
    torch=eager,
    reference=reference,
)
