"""Attention of new tokens over a paged key/value cache (Kwon et al., arXiv:2309.06180).

T query tokens, B sequences, H query heads, G key/value heads, K head size, P cache pages, S page size.
"""

from torch import Tensor

from pyllama.ops.attention import attend, check_heads, joined
from pyllama.ops.checks import cached_lengths, segment_lengths
from pyllama.ops.registry import op


def _like_queries(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


@op(
    "(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cu_seqlens_q, Tensor seq_lens, int max_seqlen_q, "
    "float? scale=None, int? window=None) -> Tensor",
    fake=_like_queries,
    q="T H K",
    kv_cache="P 2 G S K",
    block_table="int32: B max_pages",
    cu_seqlens_q="int32: B+1",
    seq_lens="int32: B",
)
def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    max_seqlen_q: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attention` of each sequence's new tokens over its cache, which already holds them.

    q: [T, H, K], may be a strided view; kv_cache: [P, 2, G, S, K], keys and values; H a multiple of G; result:
    [T, H, K]. block_table: int32 [B, max_pages], sequence b's tokens i*S to (i+1)*S are in page block_table[b, i].
    seq_lens: int32 [B], tokens in the cache, the new ones included. cu_seqlens_q: int32 [B + 1], sequence b's queries;
    max_seqlen_q: the most of any sequence, 1 in decode. scale, window: as in `attention`. Entries of block_table and
    places of pages beyond a sequence's length are never read. Raises ValueError for shapes or lengths that do not
    fit.
    """
    _, _, G, S, K = kv_cache.shape
    check_heads("paged_attention", q.shape[1], G, window)
    queries = segment_lengths("paged_attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    lengths = cached_lengths("paged_attention", seq_lens, block_table.shape[1], S)
    return attend_pages(q, kv_cache, block_table, queries, lengths, K**-0.5 if scale is None else scale, window)


def attend_pages(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    queries: list[int],
    lengths: list[int],
    scale: float,
    window: int | None,
) -> Tensor:
    """`paged_attention` as a plain function, for other ops' bodies; queries, lengths: of each sequence."""
    S, K = kv_cache.shape[3:]
    heads_21GPSK = kv_cache.permute(1, 2, 0, 3, 4).unsqueeze(1)  # gathering pages then copies them once
    sequences = []
    for b, (q_nHK, length) in enumerate(zip(q.split_with_sizes(queries), lengths, strict=True)):
        pages = block_table[b, : (length + S - 1) // S]
        k_1GmK, v_1GmK = heads_21GPSK.index_select(3, pages).flatten(3, 4)[:, :, :, :length].unbind()
        sequences.append(attend(q_nHK, k_1GmK, v_1GmK, scale, window))
    return joined(sequences, q, K)
