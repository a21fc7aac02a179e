"""What a model is, as plain data.

A `ModelConfig` says everything that the layers need and nothing about files: architectures/ reads it from a
checkpoint's config.json, layers/ builds modules from it. Which attention or feed-forward a layer has is the
*type* of its config, so "the first k layers are dense" is a different tuple, not a branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al., arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): a ramp from kept to divided frequencies, by their turns in training."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0  # turns in the original context from which a frequency is kept
    beta_slow: float = 1.0  # turns up to which it is divided by `factor`
    truncate: bool = True  # the ramp begins and ends at whole dimensions


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): each frequency divided by a factor of its own.

    A sequence of more than `original_max_positions` tokens takes the long factors, for all its tokens.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""

    theta: float
    dim: int  # rotated dimensions of each head, even; fewer than the head size: partial RoPE
    interleaved: bool = False  # pairs (0,1), (2,3), ... instead of (0, dim/2), (1, dim/2+1), ...
    scaling: RopeScaling | None = None
    magnitude: float = 1.0  # cosines and sines are multiplied by it (YaRN's and LongRoPE's attention factor)


@dataclass(frozen=True)
class GQAConfig:
    """Causal grouped-query attention (Ainslie et al., arXiv:2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    window: int | None = None  # a token sees this many keys, its own included; None: all
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "whole"] | None = None  # RMSNorm before RoPE: over each head, or over all heads at once
    clip: float | None = None  # queries, keys and values are cut to [-clip, clip] before RoPE
    dropout: float = 0.0  # of attention's probabilities, in training
    out_dropout: float = 0.0  # of what the layer adds to the residual stream, in training

    @property
    def stacked(self) -> tuple[int, ...]:
        """The rows of queries, keys and values in their one product."""
        return tuple(heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads))


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): all heads' keys and values from one latent.

    Of a head's query and key `nope_dim` dimensions carry no position; the rotated `rope.dim` ones follow, of the
    key shared by all heads.
    """

    num_heads: int
    q_rank: int | None  # of the queries' latent; None: queries come from the hidden state directly
    kv_rank: int
    nope_dim: int
    v_dim: int  # of a value head
    rope: RopeConfig
    scale: float  # of the scores
    bias: bool = False  # of the products to the latents and to the hidden state
    dropout: float = 0.0  # of attention's probabilities, in training
    norm_eps: float = 1e-6  # of the latents' norms; the reference has this whatever the model's own is

    @property
    def stacked(self) -> tuple[int, ...]:
        """The rows of the queries' latent and of an entry of the cache in their one product."""
        return self.q_rank or 0, self.kv_rank + self.rope.dim


@dataclass(frozen=True)
class MLPConfig:
    """SwiGLU feed-forward (Shazeer, arXiv:2002.05202)."""

    size: int
    bias: bool = False
    dropout: float = 0.0  # of what the layer adds to the residual stream, in training


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of SwiGLU experts; the router is the op `topk_gate`, and these are its options."""

    num_experts: int
    top_k: int
    size: int  # of each expert
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_top_k: int = 1
    float32_router: bool = False  # the router's product is computed in float32, whatever the weights' type
    shared: MLPConfig | None = None  # an expert that every token passes through
    shared_gate: bool = False  # its result is weighted by the sigmoid of one more product
    aux_loss: Literal["switch", "sequence", "batch"] = "switch"  # the load-balancing loss in training, see balance.py
    aux_loss_coef: float = 0.0  # its weight


AttentionConfig = GQAConfig | MLAConfig
FFNConfig = MLPConfig | MoEConfig


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    ffn: FFNConfig


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    max_positions: int  # the longest context, prompt and generated tokens together
    norm_eps: float
    tie_embeddings: bool
    layers: tuple[LayerConfig, ...]
    extra_layers: int = 0  # of multi-token prediction, which follow in the files and are not part of the model

    @property
    def rope_switch(self) -> int | None:
        """The length beyond which a sequence's earlier tokens are rotated anew (LongRopeScaling); None: never."""
        ropes = (layer.attention.rope for layer in self.layers)
        scalings = {rope.scaling for rope in ropes if rope is not None}
        return next((s.original_max_positions for s in scalings if isinstance(s, LongRopeScaling)), None)
