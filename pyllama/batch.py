"""Which tokens a forward pass computes, and where their keys and values live.

Sequences lie end to end without padding ("packed"), so prefill, decode and any mixture of them are one code
path. T tokens, B sequences, S page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Whole sequences, without a cache: training and `model(token_ids)`."""

    cu_seqlens: Tensor  # int32 [B + 1], sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1]
    positions: Tensor  # int32 [T], of each token in its sequence
    lengths: Tensor  # int32 [T], of each token's sequence, all that is known of it: LongRoPE depends on it
    max_seqlen: int  # tokens of the longest sequence in this pass
    max_positions: int  # no position is this large; a shape or a host value, never read from the device
    # int32 zeros, in which kernels count their blocks, and zeros again after each: for every sequence one for each
    # key/value head, but at least 3; None: they make their own, at the cost of another launch.
    counters: Tensor | None = field(default=None, kw_only=True)

    @property
    def sequences(self) -> Tensor:
        """int64 [T], each token's sequence."""
        tokens_T = torch.arange(len(self.positions), device=self.positions.device, dtype=torch.int32)
        return torch.bucketize(tokens_T, self.cu_seqlens[1:], right=True)

    @classmethod
    def rectangle(cls, sequences: int, tokens: int, device: torch.device) -> Packed:
        """`sequences` sequences of `tokens` tokens each."""
        cu_seqlens_B = torch.arange(sequences + 1, device=device, dtype=torch.int32) * tokens
        positions_T = torch.arange(tokens, device=device, dtype=torch.int32).repeat(sequences)
        return cls(cu_seqlens_B, positions_T, torch.full_like(positions_T, tokens), tokens, tokens)


class Cached(NamedTuple):
    """All tokens of a batch's sequences, in order, M in all."""

    slots: Tensor  # int32 [M], page * S + offset
    cu_seqlens: Tensor  # int32 [B + 1], as in `Packed`
    max_seqlen: int


@dataclass(frozen=True)
class Batch(Packed):
    """New tokens of sequences whose earlier keys and values are in a paged cache."""

    seq_lens: Tensor  # int32 [B], tokens of each sequence in the cache after this pass
    block_table: Tensor  # int32 [B, pages], the cache pages of each sequence, in order
    slots: Tensor  # int32 [T], page * S + offset: where each token's key and value go; -1: nowhere
    page_size: int  # S

    @cached_property
    def cached(self) -> Cached:
        """Where the sequences' tokens are, for all layers; reads lengths from the device, so for prompts only."""
        lengths: list[int] = self.seq_lens.tolist()
        rows = [row[:length] for row, length in zip(self._slots_of_pages(), lengths, strict=True)]
        cu_seqlens_B = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.seq_lens.device)
        return Cached(torch.cat(rows), cu_seqlens_B, max(lengths))

    def _slots_of_pages(self) -> Tensor:
        """[B, pages * S]: where each token of a sequence has its place, whether it is there yet or not."""
        offsets_S = torch.arange(self.page_size, dtype=torch.int32, device=self.block_table.device)
        return (self.block_table.unsqueeze(-1) * self.page_size + offsets_S).flatten(1)

    @classmethod
    def from_lengths(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_table: Tensor,
        page_size: int,
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Sequence b computes its last `query_lens[b]` tokens, out of `seq_lens[b]`.

        lengths: of the sequences, where later passes compute more of what is already known; None: `seq_lens`.
        """
        device = block_table.device
        capacity = block_table.shape[1] * page_size
        for query, total in zip(query_lens, seq_lens, strict=True):
            if not 1 <= query <= total <= capacity:
                raise ValueError(
                    f"{query} new of {total} tokens: at least 1 must be new, and all must fit the "
                    f"sequence's {capacity} cache slots"
                )
        query_B = torch.tensor(query_lens, dtype=torch.int32)
        total_B = torch.tensor(seq_lens, dtype=torch.int32)
        cu_seqlens_B = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
        torch.cumsum(query_B, 0, out=cu_seqlens_B[1:])
        # Token t of sequence b is at seq_lens[b] - query_lens[b] + (t - cu_seqlens[b]).
        sequence_T = torch.repeat_interleave(torch.arange(len(query_lens)), query_B)
        positions_T = torch.arange(len(sequence_T)) + (total_B - query_B - cu_seqlens_B[:-1])[sequence_T]
        lengths_T = (total_B if lengths is None else torch.tensor(lengths, dtype=torch.int32))[sequence_T]
        sequence_T, positions_T = sequence_T.to(device), positions_T.to(device)
        slots_T = block_table[sequence_T, positions_T // page_size] * page_size + positions_T % page_size
        return cls(
            cu_seqlens=cu_seqlens_B.to(device),
            positions=positions_T.to(torch.int32),
            lengths=lengths_T.to(device),
            max_seqlen=max(query_lens, default=0),
            max_positions=capacity,
            seq_lens=total_B.to(device),
            block_table=block_table,
            slots=slots_T.to(torch.int32),
            page_size=page_size,
        )
