"""The state of decoding sequences moves on by one token. B sequences, S page size."""

import torch
from torch import Tensor

from pyllama.ops.registry import nothing, op


@op(
    "(Tensor(a!) positions, Tensor(b!) seq_lens, Tensor(c!) slots, Tensor block_table, int page_size) -> ()",
    fake=nothing,
    positions="int32: B",
    seq_lens="int32: B",
    slots="int32: B",
    block_table="int32: B max_pages",
)
def advance_(positions: Tensor, seq_lens: Tensor, slots: Tensor, block_table: Tensor, page_size: int) -> None:
    """One more token of each sequence: its position, the new length, and its place in the paged cache, in place.

    positions, seq_lens, slots: int32 [B]; positions becomes seq_lens, seq_lens one more, slots page * S + place of the
    position, the page being block_table[b, position // S] (int32 [B, max_pages]); -1, which is not stored, beyond the
    block table. A sequence of length 0 is a place of the batch that nobody uses: it keeps length and position 0 and
    slot -1. page_size: S, at least 1. Raises ValueError for shapes or values that do not fit.
    """
    if page_size < 1:
        raise ValueError(f"advance_: page_size is {page_size}, but must be at least 1")
    max_pages = block_table.shape[1]
    used_B = seq_lens > 0
    positions.copy_(seq_lens)
    seq_lens.add_(used_B)
    if max_pages == 0:
        slots.fill_(-1)
        return
    column_B = positions.div(page_size, rounding_mode="floor")
    page_B = block_table.gather(1, column_B.clamp(max=max_pages - 1).unsqueeze(1).long()).squeeze(1)
    slots.copy_(torch.where((column_B < max_pages) & used_B, page_B * page_size + positions.remainder(page_size), -1))
