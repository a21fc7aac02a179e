"""Attention layers. T tokens, D hidden size, H query heads, G key/value heads, K head size."""

from __future__ import annotations

from torch import Tensor, nn

from pyllama.batch import Batch, Packed
from pyllama.config import GQAConfig
from pyllama.layers.linear import Linear
from pyllama.layers.norm import RMSNorm
from pyllama.ops.attention import attention
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
        self.out = Linear(heads * size, hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(size, norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, norm_eps) if config.qk_norm else None
        self.norm_eps = norm_eps

    def forward(self, x_TD: Tensor, batch: Packed, cos_sin: Tensor | None, kv_cache: Tensor | None) -> Tensor:
        qkv = self.qkv(x_TD)
        if isinstance(batch, Batch) and kv_cache is not None:
            out_THK = self._cached(qkv, batch, cos_sin, kv_cache)
        else:
            out_THK = self._whole(qkv, batch, cos_sin)
        return self.out(out_THK.flatten(1))

    def _cached(self, qkv: Tensor, batch: Batch, cos_sin: Tensor | None, kv_cache: Tensor) -> Tensor:
        config = self.config
        norm_rope_store_(
            qkv,
            kv_cache,
            batch.positions,
            batch.slots,
            cos_sin,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.norm_eps,
            config.rope is not None and config.rope.interleaved,
        )
        q_THK = qkv[:, : config.num_heads * config.head_dim].unflatten(1, (config.num_heads, config.head_dim))
        return paged_attention(
            q_THK,
            kv_cache,
            batch.block_table,
            batch.cu_seqlens,
            batch.seq_lens,
            batch.max_seqlen,
            window=config.window,
        )

    def _whole(self, qkv: Tensor, batch: Packed, cos_sin: Tensor | None) -> Tensor:
        """The same with functional ops, which have gradients."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q_THK, k_TGK, v_TGK = qkv.unflatten(1, (sum(heads), config.head_dim)).split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        if config.rope is not None and cos_sin is not None:
            q_THK = rope(q_THK, cos_sin, batch.positions, config.rope.interleaved)
            k_TGK = rope(k_TGK, cos_sin, batch.positions, config.rope.interleaved)
        seqlens, longest = batch.cu_seqlens, batch.max_seqlen
        return attention(q_THK, k_TGK, v_TGK, seqlens, seqlens, longest, longest, window=config.window)
