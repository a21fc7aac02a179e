"""A read-only stream in Triton, which only a GPU has: what reading memory can reach."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

BLOCKS = (4096, 8192, 16384)  # which is fastest differs from device to device


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum_of_blocks(x_ptr, sum_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at)))


def read(x: Tensor, block: int) -> Tensor:
    """Reads the whole blocks of x, float32, and writes one number for each."""
    sums = x.new_empty(x.numel() // block)
    with torch.cuda.device(x.device):  # which Triton launches on
        _sum_of_blocks[(len(sums),)](x, sums, block=block, num_warps=8)
    return sums
