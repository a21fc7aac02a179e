"""Attention layers. T tokens, D hidden size, H query heads, G key/value heads, K head size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyllama.batch import Batch, Packed
from pyllama.config import GQAConfig
from pyllama.layers.linear import Linear
from pyllama.layers.norm import RMSNorm
from pyllama.layers.rope import Rotation
from pyllama.ops.attention import attention
from pyllama.ops.decode_attention import decode_attention_
from pyllama.ops.norm_rope_store import norm_rope_store_
from pyllama.ops.paged_attention import paged_attention
from pyllama.ops.rope import rope


class GQA(nn.Module):
    """Causal grouped-query attention; q, k and v are one product, `qkv`, with their rows stacked."""

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.qkv = Linear(hidden_size, (heads + 2 * kv_heads) * size, bias=config.qkv_bias)
        self.out = Linear(heads * size, hidden_size, bias=config.out_bias, dropout=config.out_dropout)
        per_head = config.qk_norm == "head"
        self.q_norm = RMSNorm(size if per_head else heads * size, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size if per_head else kv_heads * size, norm_eps) if config.qk_norm else None
        self.norm_eps = norm_eps
        # What the kernel of one op for a whole step of decoding takes.
        self._in_one = size <= 128 and heads <= 16 * kv_heads

    def forward(
        self,
        x_TD: Tensor,
        norm: RMSNorm,
        batch: Packed,
        rotation: Rotation | None,
        kv_cache: Tensor | None,
        next_weight: Tensor | None = None,
    ) -> Tensor:
        """The residual stream x with the layer's result added; norm: what comes first; next_weight: see `add_to`."""
        qkv = self._over_all_heads(self.qkv.normed(x_TD, norm))
        if isinstance(batch, Batch) and kv_cache is not None:
            out_THK = self._cached(qkv, batch, rotation, kv_cache)
        else:
            out_THK = self._whole(qkv, batch, rotation)
        return self.out.add_to(x_TD, out_THK.flatten(1), next_weight)

    def _over_all_heads(self, qkv: Tensor) -> Tensor:
        """What some models do to queries and keys before they are heads: a norm, a limit (OLMoE)."""
        config = self.config
        if config.qk_norm == "whole" and self.q_norm is not None and self.k_norm is not None:
            rows = config.num_heads, config.num_kv_heads, config.num_kv_heads
            q, k, v = qkv.split([heads * config.head_dim for heads in rows], dim=1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        return qkv if config.clip is None else qkv.clamp(-config.clip, config.clip)

    def _cached(self, qkv: Tensor, batch: Batch, rotation: Rotation | None, kv_cache: Tensor) -> Tensor:
        config = self.config
        q_norm, k_norm = (self.q_norm, self.k_norm) if config.qk_norm == "head" else (None, None)
        positions = batch.positions if rotation is None else rotation.rows
        turned = (
            None if rotation is None else rotation.cos_sin,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            self.norm_eps,
            config.rope is not None and config.rope.interleaved,
        )
        q_THK = qkv[:, : config.num_heads * config.head_dim].unflatten(1, (config.num_heads, config.head_dim))
        if batch.max_seqlen == 1 and len(qkv) == len(batch.seq_lens) and self._in_one:
            pages, lengths = batch.block_table, batch.seq_lens
            decode_attention_(
                qkv, kv_cache, pages, lengths, positions, *turned, window=config.window, counters=batch.counters
            )
            return q_THK
        norm_rope_store_(qkv, kv_cache, positions, batch.slots, *turned)
        return paged_attention(
            q_THK,
            kv_cache,
            batch.block_table,
            batch.cu_seqlens,
            batch.seq_lens,
            batch.max_seqlen,
            window=config.window,
        )

    def _whole(self, qkv: Tensor, batch: Packed, rotation: Rotation | None) -> Tensor:
        """The same with functional ops, which have gradients."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q_THK, k_TGK, v_TGK = qkv.unflatten(1, (sum(heads), config.head_dim)).split(heads, dim=1)
        if config.qk_norm == "head" and self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        if config.rope is not None and rotation is not None:
            q_THK = rope(q_THK, rotation.cos_sin, rotation.rows, config.rope.interleaved)
            k_TGK = rope(k_TGK, rotation.cos_sin, rotation.rows, config.rope.interleaved)
        dropout = config.dropout if self.training and torch.is_grad_enabled() else 0.0
        return whole_attention(q_THK, k_TGK, v_TGK, batch, None, config.window, dropout)


def whole_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, batch: Packed, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    """The op `attention` over a batch of whole sequences; with dropout of the probabilities torch's own, for sequences
    of one length, since the op's backward could not draw the same numbers again."""
    longest = batch.max_seqlen
    if not dropout:
        seqlens = batch.cu_seqlens
        return attention(q_THK, k_TGK, v_TGV, seqlens, seqlens, longest, longest, scale, window)
    q_BHTK, k_BGTK, v_BGTV = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGV))
    mask = None
    if window is not None and window < longest:
        age_TT = torch.arange(longest, device=q_THK.device).unsqueeze(1) - torch.arange(longest, device=q_THK.device)
        mask = (age_TT >= 0) & (age_TT < window)
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTK,
        k_BGTK,
        v_BGTV,
        mask,
        dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )
    return out_BHTV.transpose(1, 2).flatten(0, 1)
