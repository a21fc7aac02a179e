"""Causal attention with grouped queries (Ainslie et al., arXiv:2305.13245) over ragged sequences.

T query tokens, H query heads, G key/value heads, K head size, V value head size, n and m one sequence's queries and
keys. `attend` is also the body of paged_attention and mla_paged_attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllama.ops.checks import segment_lengths
from pyllama.ops.registry import cast, compute_dtype, op


def _like_queries(q: Tensor, k: Tensor, v: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@op(
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "float? scale=None, int? window=None) -> Tensor",
    fake=_like_queries,
    q="T H K",
    k="keys G K",
    v="keys G V",
    cu_seqlens_q="int32: B+1",
    cu_seqlens_k="int32: B+1",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T scale) v per sequence and head, causal, aligned at the end of the keys.

    q: [T, H, K]; k: [keys, G, K]; v: [keys, G, V]; H a multiple of G; result: [T, H, V]. cu_seqlens_q, cu_seqlens_k:
    int32 [B + 1], where sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; max_seqlen_q, max_seqlen_k: the
    longest sequence. The last query of a sequence sees its last key, the one before all but the last, and so on.
    scale: None for K**-0.5. window: a query sees the last `window` keys, its own included; None for all.
    A query that sees no key gives 0. Raises ValueError for shapes or values that do not fit.
    """
    check_heads("attention", q.shape[1], k.shape[1], window)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q_lengths = segment_lengths("attention", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    k_lengths = segment_lengths("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    sequences = [
        attend(q_nHK, k_mGK.transpose(0, 1).unsqueeze(0), v_mGV.transpose(0, 1).unsqueeze(0), scale, window)
        for q_nHK, k_mGK, v_mGV in zip(
            q.split_with_sizes(q_lengths), k.split_with_sizes(k_lengths), v.split_with_sizes(k_lengths), strict=True
        )
    ]
    return joined(sequences, q, v.shape[2])


def attend(q_nHK: Tensor, k_1GmK: Tensor, v_1GmV: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of one sequence, [n, H, V], in float32 or wider."""
    n, m = q_nHK.shape[0], k_1GmK.shape[2]
    if n > m:  # the first queries see no key
        return F.pad(attend(q_nHK[n - m :], k_1GmK, v_1GmV, scale, window), (0, 0, 0, 0, n - m, 0))
    if window is not None and m > n - 1 + window:  # the first keys are seen by no query
        k_1GmK, v_1GmV = (t[:, :, -(n - 1 + window) :] for t in (k_1GmK, v_1GmV))
        m = n - 1 + window
    compute = compute_dtype(q_nHK)
    if m == 0:
        return q_nHK.new_zeros(0, q_nHK.shape[1], v_1GmV.shape[3], dtype=compute)
    if n == 1:  # the heads of a group see the same keys: they are as good as queries, and their keys are read once
        G, K = k_1GmK.shape[1], q_nHK.shape[2]
        q_1GrK = cast(q_nHK, compute).reshape(1, G, -1, K)
        out_1GrV = F.scaled_dot_product_attention(q_1GrK, cast(k_1GmK, compute), cast(v_1GmV, compute), scale=scale)
        return out_1GrV.flatten(1, 2)
    mask = None
    if n < m or (window is not None and window < m):
        age = torch.arange(m - n, m, device=q_nHK.device)[:, None] - torch.arange(m, device=q_nHK.device)
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
    out_1HnV = F.scaled_dot_product_attention(
        cast(q_nHK, compute).transpose(0, 1).unsqueeze(0),
        cast(k_1GmK, compute),
        cast(v_1GmV, compute),
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_nHK.shape[1] != k_1GmK.shape[1],
    )
    return out_1HnV[0].transpose(0, 1)


def joined(sequences: list[Tensor], q_THK: Tensor, V: int) -> Tensor:
    """The sequences' results one after another, in the queries' data type."""
    if not sequences:
        return q_THK.new_empty(0, q_THK.shape[1], V)
    out = sequences[0] if len(sequences) == 1 else torch.cat(sequences)
    return cast(out, q_THK.dtype).contiguous()


def check_heads(op: str, H: int, G: int, window: int | None) -> None:
    if H % G:
        raise ValueError(f"{op}: q has H = {H} heads, but must have a multiple of the keys' G = {G}")
    check_window(op, window)


def check_window(op: str, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}, but must be at least 1 (or None)")
