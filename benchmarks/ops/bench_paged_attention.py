"""paged_attention: decode of batches over their caches, and prefill of one prompt whose keys are in the cache already.

Torch has no paged cache. Its eager figure gathers the pages first, as it must; its back ends get keys and values that
lie together, which is the best case for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.ops.bench_attention import BACKENDS, LAST, backend, causal_flops, explicit
from benchmarks.shapes import Scope
from pyllama.ops.paged_attention import paged_attention

S = 64  # tokens of a page, as in pyllama's cache
WORKSPACE_BYTES = 512 * 2**20  # flashinfer's


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if model.rank:  # latent attention has its own op
            continue
        heads = {"H": model.H, "G": model.G, "K": model.K}
        what = f"{model.H}/{model.G} heads of {model.K}"
        for B in scope.batches:
            for m in scope.contexts:
                yield Case(name, f"decode {B} x {m}, {what}", {"B": B, "n": 1, "m": m, **heads})
        for T in scope.prompts:
            yield Case(name, f"prefill {T}, {what}", {"B": 1, "n": T, "m": T, **heads})


def inputs(dtype: torch.dtype, B: int, n: int, m: int, H: int, G: int, K: int) -> tuple[Any, ...]:
    """Queries, the paged cache, its block table, bounds and lengths, and the same keys and values in one piece.

    Pages are scattered at random, as they are in a server that has run for a while.
    """
    assert m % S == 0, "so that both caches hold the same"
    pages = m // S
    q = torch.randn(B * n, H, K, dtype=dtype)
    kv_cache = torch.randn(B * pages, 2, G, S, K, dtype=dtype)
    block_table = torch.randperm(B * pages).to(torch.int32).view(B, pages)
    bounds = torch.arange(B + 1, dtype=torch.int32) * n
    lengths = torch.full((B,), m, dtype=torch.int32)
    return q, kv_cache, block_table, bounds, lengths, *gathered(kv_cache, block_table)


def work(dtype: torch.dtype, B: int, n: int, m: int, H: int, G: int, K: int) -> Work:
    cached = 2 * B * m * G * K * dtype.itemsize
    flops = B * causal_flops(n, m, H, K, K)
    if n == 1:
        return Work(moved=cached, flops=flops, limit="read")
    return Work(moved=cached + 2 * B * n * H * K * dtype.itemsize, flops=flops, limit="product")


def gathered(kv_cache: Tensor, block_table: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of the sequences, [B, G, m, K] each."""
    B, pages = block_table.shape
    _, _, G, _, K = kv_cache.shape
    picked = kv_cache[block_table.long()].permute(2, 0, 3, 1, 4, 5)
    return picked.reshape(2, B, G, pages * S, K).unbind()


def formula(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, bounds: Tensor, lengths: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    k, v = gathered(kv_cache, block_table)
    return explicit(q.view(len(k), -1, *q.shape[1:]), k, v).flatten(0, 1)


def reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, bounds: Tensor, lengths: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The last queries: some of the only sequence, or those of the last sequences."""
    if len(k) == 1:
        return explicit(q[None, -LAST:].double(), k.double(), v.double())[0]
    return explicit(q[-LAST:, None].double(), k[-LAST:].double(), v[-LAST:].double())[:, 0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On keys and values in one piece. In decode a group's heads are as good as queries, which is the fastest way."""
    B, G = k.shape[:2]
    if len(q) == B:
        out = F.scaled_dot_product_attention(q.view(B, G, -1, q.shape[2]), k, v)
        return out.reshape(q.shape)
    q_BHnK = q.view(B, -1, *q.shape[1:]).transpose(1, 2)
    out = F.scaled_dot_product_attention(q_BHnK, k, v, is_causal=True, enable_gqa=q.shape[1] != G)
    return out.transpose(1, 2).flatten(0, 1)


def eager(q: Tensor, kv_cache: Tensor, block_table: Tensor, *others: Tensor) -> Tensor:
    return sdpa(q, *gathered(kv_cache, block_table))


def plan_decode(wrapper: Any, *inputs: Tensor, use_tensor_cores: bool) -> Any:
    """flashinfer's kernel for one query per sequence; None for prefill."""
    q, kv_cache, block_table = inputs[:3]
    if len(q) != len(block_table):
        return None
    planned = wrapper(workspace(q), "HND", use_tensor_cores=use_tensor_cores)
    planned.plan(*pages_of(block_table), q.shape[1], kv_cache.shape[2], q.shape[2], S, q_data_type=q.dtype)
    return planned


def plan_prefill(wrapper: Any, *inputs: Tensor) -> Any:
    """flashinfer's kernel for several queries per sequence; None for decode."""
    q, kv_cache, block_table, bounds = inputs[:4]
    if len(q) == len(block_table):
        return None
    planned = wrapper(workspace(q), "HND")
    heads = (q.shape[1], kv_cache.shape[2], q.shape[2])
    planned.plan(bounds, *pages_of(block_table), *heads, S, causal=True, q_data_type=q.dtype)
    return planned


def workspace(q: Tensor) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)


def pages_of(block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """flashinfer's form of a block table of full pages: bounds, pages, tokens in the last pages."""
    B, pages = block_table.shape
    bounds = torch.arange(B + 1, dtype=torch.int32, device=block_table.device) * pages
    return bounds, block_table.flatten(), torch.full_like(bounds[1:], S)


def planned(function: Any, q: Tensor, kv_cache: Tensor, *others: Tensor) -> Tensor:
    return function.run(q, kv_cache)


def contiguous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of queries, keys and values, on whole inputs."""
    return lambda q, kv_cache, block_table, bounds, lengths, k, v: function(q, k, v)


BENCH = Bench(
    op="paged_attention",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=lambda q, kv_cache, block_table, bounds, lengths, k, v: paged_attention(
        q, kv_cache, block_table, bounds, lengths, len(q) // len(lengths)
    ),
    formula=formula,
    torch=eager,
    peers={name: contiguous(backend(chosen, sdpa)) for name, chosen in BACKENDS.items()}
    | {
        "flashinfer": Peer(
            "flashinfer:BatchDecodeWithPagedKVCacheWrapper", planned, partial(plan_decode, use_tensor_cores=False)
        ),
        "flashinfer tensor cores": Peer(
            "flashinfer:BatchDecodeWithPagedKVCacheWrapper", planned, partial(plan_decode, use_tensor_cores=True)
        ),
        "flashinfer prefill": Peer("flashinfer:BatchPrefillWithPagedKVCacheWrapper", planned, plan_prefill),
    },
    reference=reference,
)
