"""Multi-head latent attention over a paged cache, absorbed form (DeepSeek-V2, arXiv:2405.04434).

T query tokens, B sequences, H query heads, P cache pages, S page size, L latent entry (rank + rope dimensions).
"""

from typing import Any

from torch import Tensor

from pyllama.ops.attention import attend, joined
from pyllama.ops.checks import cached_lengths, segment_lengths
from pyllama.ops.registry import op


def _empty(q: Tensor, *args: Any) -> Tensor:
    rank = args[5]
    return q.new_empty(q.shape[0], q.shape[1], rank)


@op(
    "(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cu_seqlens_q, Tensor seq_lens, int max_seqlen_q, "
    "int rank, float scale) -> Tensor",
    fake=_empty,
    q="T H L",
    kv_cache="P S L",
    block_table="int32: B max_pages",
    cu_seqlens_q="int32: B+1",
    seq_lens="int32: B",
)
def mla_paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    rank: int,
    scale: float,
) -> Tensor:
    """`paged_attention` where all heads share one cache entry: the key is all of it, the value its first `rank`.

    q: [T, H, rank + rope]; kv_cache: [P, S, rank + rope]; result: [T, H, rank]; the other arguments are
    paged_attention's. Raises ValueError for shapes or lengths that do not fit.
    """
    S, L = kv_cache.shape[1:]
    if not 0 < rank <= L:
        raise ValueError(f"mla_paged_attention: rank is {rank}, but must be in 1 to L = {L}, the size of an entry")
    sequences = []
    queries = q.split_with_sizes(segment_lengths("mla_paged_attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0]))
    lengths = cached_lengths("mla_paged_attention", seq_lens, block_table.shape[1], S)
    for b, (q_nHL, length) in enumerate(zip(queries, lengths, strict=True)):
        pages = block_table[b, : (length + S - 1) // S]
        k_11mL = kv_cache.index_select(0, pages).view(1, 1, -1, L)[:, :, :length]
        sequences.append(attend(q_nHL, k_11mL, k_11mL[..., :rank], scale, None))
    return joined(sequences, q, rank)
