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


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""

    theta: float
    dim: int  # rotated dimensions of each head, even; fewer than the head size: partial RoPE
    interleaved: bool = False  # pairs (0,1), (2,3), ... instead of (0, dim/2), (1, dim/2+1), ...
    scaling: RopeScaling | None = None


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
    qk_norm: bool = False  # RMSNorm over each query and key head before RoPE


@dataclass(frozen=True)
class MLPConfig:
    """SwiGLU feed-forward (Shazeer, arXiv:2002.05202)."""

    size: int
    bias: bool = False


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
    shared: MLPConfig | None = None  # an expert that every token passes through
    aux_loss_coef: float = 0.0  # weight of the load-balancing loss in training


AttentionConfig = GQAConfig
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
