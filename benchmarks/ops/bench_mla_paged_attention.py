"""mla_paged_attention: absorbed latent attention in decode. Torch gathers the pages first, as it has no paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Bench, Case, Peer, Work
from benchmarks.ops.bench_paged_attention import pages_of, workspace
from benchmarks.shapes import Scope
from pyllama.ops.mla_paged_attention import mla_paged_attention

S = 64  # tokens of a page, as in pyllama's cache
SCALE = 192**-0.5
BALANCE = 100  # operations per byte read up to which memory is the limit


def cases(scope: Scope) -> Iterator[Case]:
    for name, model in scope.models.items():
        if not model.rank:
            continue
        for B in scope.batches:
            for m in scope.contexts:
                sizes = {"B": B, "m": m, "H": model.H, "rank": model.rank, "R": model.R}
                yield Case(name, f"decode {B} x {m}, {model.H} heads of {model.rank} + {model.R}", sizes)


def inputs(dtype: torch.dtype, B: int, m: int, H: int, rank: int, R: int) -> tuple[Any, ...]:
    pages = m // S
    q, cache = torch.randn(B, H, rank + R, dtype=dtype), torch.randn(B * pages, S, rank + R, dtype=dtype)
    block_table = torch.randperm(B * pages).int().view(B, pages)
    return q, cache, block_table, torch.arange(B + 1, dtype=torch.int32), torch.full((B,), m, dtype=torch.int32), rank


def work(dtype: torch.dtype, B: int, m: int, H: int, rank: int, R: int) -> Work:
    moved, flops = B * m * (rank + R) * dtype.itemsize, 2 * B * m * H * (2 * rank + R)
    return Work(moved=moved, flops=flops, limit="product" if flops > BALANCE * moved else "read")


def formula(q: Tensor, cache: Tensor, block_table: Tensor, bounds: Tensor, lengths: Tensor, rank: int) -> Tensor:
    keys = cache[block_table.long()].flatten(1, 2)
    weights = (torch.einsum("bhl,bml->bhm", q, keys) * SCALE).softmax(-1)
    return torch.einsum("bhm,bmc->bhc", weights, keys[..., :rank])


def eager(q: Tensor, cache: Tensor, block_table: Tensor, bounds: Tensor, lengths: Tensor, rank: int) -> Tensor:
    """Heads are as good as queries, since all see the same keys."""
    keys = cache[block_table.long()].flatten(1, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(q.unsqueeze(1), keys, keys[..., :rank], scale=SCALE)[:, 0]


def plan(wrapper: Any, q: Tensor, cache: Tensor, table: Tensor, bounds: Tensor, lengths: Tensor, rank: int) -> Any:
    planned = wrapper(workspace(q))
    page_bounds, pages, _ = pages_of(table)
    entry, heads = cache.shape[2], q.shape[1]
    planned.plan(
        bounds, page_bounds, pages, lengths, heads, rank, entry - rank, S, True, SCALE, q.dtype, cache.dtype
    )  # fmt: skip
    return planned


def flashinfer(planned: Any, q: Tensor, cache: Tensor, *others: Any) -> Tensor:
    rank = others[-1]
    return planned.run(q[..., :rank], q[..., rank:], cache[..., :rank], cache[..., rank:])


BENCH = Bench(
    op="mla_paged_attention",
    cases=cases,
    inputs=inputs,
    work=work,
    pyllama=lambda q, cache, table, bounds, lengths, rank: mla_paged_attention(
        q, cache, table, bounds, lengths, 1, rank, SCALE
    ),
    formula=formula,
    torch=eager,
    peers={"flashinfer": Peer("flashinfer.mla:BatchMLAPagedAttentionWrapper", flashinfer, plan)},
)
