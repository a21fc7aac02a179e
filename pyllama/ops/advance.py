"""The state of decoding sequences moves on by one token. B sequences, S page size."""

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
    positions.copy_(seq_lens)
    seq_lens.add_(positions.sign())
    capacity = block_table.shape[1] * page_size
    if capacity <= 1:  # none has a place for one more
        slots.fill_(-1)
        return
    stored_B = positions.clamp(1, capacity - 1)
    page_B = block_table.gather(1, stored_B.div(page_size, rounding_mode="floor").unsqueeze(1).long()).squeeze(1)
    slots_B = stored_B.remainder(page_size).add_(page_B, alpha=page_size)
    slots.copy_(slots_B.where(positions == stored_B, -1))
