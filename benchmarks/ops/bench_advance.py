"""advance_: the bookkeeping of one decoding step. It moves next to nothing: the time of a launch is what counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Bench, Case, Work
from benchmarks.shapes import Scope
from pyllama.ops.advance import advance_

S = 64  # page size


def cases(scope: Scope) -> Iterator[Case]:
    for batch in scope.batches:
        yield Case("any", f"{batch} sequences", {"B": batch, "max_pages": max(scope.contexts) // S})


def inputs(dtype: torch.dtype, B: int, max_pages: int) -> tuple[Any, ...]:
    lengths = torch.randint(1, max_pages * S, (B,), dtype=torch.int32)  # they grow from call to call, past the table
    table = torch.randperm(B * max_pages).view(B, max_pages).to(torch.int32)
    return torch.empty_like(lengths), lengths, torch.empty_like(lengths), table


def work(dtype: torch.dtype, B: int, max_pages: int) -> Work:
    return Work(moved=5 * 4 * B, flops=0, limit="copy")


def advance(positions: Tensor, seq_lens: Tensor, slots: Tensor, block_table: Tensor) -> Tensor:
    advance_(positions, seq_lens, slots, block_table, S)
    return slots


def formula(positions: Tensor, seq_lens: Tensor, slots: Tensor, block_table: Tensor) -> Tensor:
    pages = block_table.gather(1, (seq_lens // S).long().clamp(max=block_table.shape[1] - 1)[:, None])[:, 0]
    return pages * S + seq_lens % S


BENCH = Bench(op="advance_", cases=cases, inputs=inputs, work=work, pyllama=advance, formula=formula)
