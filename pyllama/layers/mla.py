"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

T tokens, M cached tokens of all sequences, D hidden size, H heads, N dimensions of a head without position, R
rotated ones, V value head size, C rank of the latent of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyllama.batch import Batch, Packed
from pyllama.config import MLAConfig
from pyllama.layers.attention import whole_attention
from pyllama.layers.linear import Linear, few
from pyllama.layers.norm import RMSNorm
from pyllama.layers.rope import Rotation
from pyllama.ops.attention import attention
from pyllama.ops.mla_paged_attention import mla_paged_attention
from pyllama.ops.mla_rope_store import mla_rope_store_
from pyllama.ops.rope import rope


class MLA(nn.Module):
    """Causal attention whose cache holds a latent of all heads' keys and values, and one rotated key.

    The products from the hidden state to latents (of the queries, if they have one, and the entry of the cache) are
    one, `down`, with their rows stacked. Prompts expand the latents to keys and values of each head (`kv_up`); a step
    of decoding moves that product to the queries and the result instead ("absorbed"), so that it reads the latents as
    they are.
    """

    def __init__(self, config: MLAConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        queries = config.num_heads * (config.nope_dim + config.rope.dim)
        self.down = Linear(hidden_size, (config.q_rank or 0) + config.kv_rank + config.rope.dim, bias=config.bias)
        self.q_norm = RMSNorm(config.q_rank, config.norm_eps) if config.q_rank else None
        self.q_up = Linear(config.q_rank or hidden_size, queries, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, config.norm_eps)
        self.kv_up = Linear(config.kv_rank, config.num_heads * (config.nope_dim + config.v_dim), bias=False)
        self.out = Linear(config.num_heads * config.v_dim, hidden_size, bias=config.bias)

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
        assert rotation is not None  # MLAConfig always has RoPE
        config = self.config
        # For few tokens the products normalise as they read; for many, what two products take is normalised once.
        normed = (x_TD, norm) if few(x_TD) else (norm(x_TD), None)
        q, latent = self.down.normed(*normed).tensor_split([config.q_rank or 0], dim=1)
        q = self.q_up.normed(*(normed if self.q_norm is None else (q, self.q_norm)))
        q_THK = q.unflatten(1, (config.num_heads, config.nope_dim + config.rope.dim))
        if isinstance(batch, Batch) and kv_cache is not None:
            mla_rope_store_(
                q_THK,
                latent,
                kv_cache,
                self.kv_norm.weight,
                rotation.rows,
                batch.slots,
                rotation.cos_sin,
                config.norm_eps,
                config.rope.interleaved,
            )
            cached = self._absorbed if batch.max_seqlen == 1 else self._expanded
            out_THV = cached(q_THK, batch, kv_cache)
        else:
            out_THV = self._whole(q_THK, latent, batch, rotation)
        return self.out.add_to(x_TD, out_THV.flatten(1), next_weight)

    def _absorbed(self, q_THK: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        config = self.config
        q_THN, q_THR = q_THK.split([config.nope_dim, config.rope.dim], dim=-1)
        kv_up_HFC = self.kv_up.weight.unflatten(0, (config.num_heads, -1))
        key_HNC, value_HVC = kv_up_HFC.split([config.nope_dim, config.v_dim], dim=1)
        q_HTC = torch.bmm(q_THN.transpose(0, 1), key_HNC)
        out_THC = mla_paged_attention(
            torch.cat((q_HTC.transpose(0, 1), q_THR), dim=-1),
            kv_cache,
            batch.block_table,
            batch.cu_seqlens,
            batch.seq_lens,
            batch.max_seqlen,
            config.kv_rank,
            config.scale,
        )
        return torch.bmm(out_THC.transpose(0, 1), value_HVC.mT).transpose(0, 1)

    def _expanded(self, q_THK: Tensor, batch: Batch, kv_cache: Tensor) -> Tensor:
        slots_M, cu_seqlens, longest = batch.cached
        entry_ML = kv_cache.flatten(0, 1).index_select(0, slots_M)
        k_MHK, v_MHV = self._keys_values(*entry_ML.tensor_split([self.config.kv_rank], dim=1))
        scale = self.config.scale
        return attention(q_THK, k_MHK, v_MHV, batch.cu_seqlens, cu_seqlens, batch.max_seqlen, longest, scale)

    def _whole(self, q_THK: Tensor, latent: Tensor, batch: Packed, rotation: Rotation) -> Tensor:
        """The same with functional ops, which have gradients."""
        config = self.config
        q_THN, q_THR = q_THK.split([config.nope_dim, config.rope.dim], dim=-1)
        q_THK = torch.cat((q_THN, rope(q_THR, rotation.cos_sin, rotation.rows, config.rope.interleaved)), dim=-1)
        latent_TC, key_TR = latent.split([config.kv_rank, config.rope.dim], dim=1)
        key_T1R = rope(key_TR.unsqueeze(1), rotation.cos_sin, rotation.rows, config.rope.interleaved)
        k_THK, v_THV = self._keys_values(self.kv_norm(latent_TC), key_T1R.squeeze(1))
        dropout = config.dropout if self.training and torch.is_grad_enabled() else 0.0
        return whole_attention(q_THK, k_THK, v_THV, batch, config.scale, None, dropout)

    def _keys_values(self, latent_MC: Tensor, key_MR: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys and values: [M, H, N + R], [M, H, V]."""
        config = self.config
        kv = self.kv_up(latent_MC).unflatten(1, (config.num_heads, config.nope_dim + config.v_dim))
        k_MHN, v_MHV = kv.split([config.nope_dim, config.v_dim], dim=-1)
        return torch.cat((k_MHN, key_MR.unsqueeze(1).expand(-1, config.num_heads, -1)), dim=-1), v_MHV
