"""What families share: the parts of a decoder's configuration, and the rules of the usual tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyllama.architectures.reader import REQUIRED, Reader
from pyllama.config import (
    FFNConfig,
    GQAConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
)
from pyllama.weights import Rule, WeightTable


class ReadConfig(Protocol):
    def __call__(self, reader: Reader) -> ModelConfig: ...


@dataclass(frozen=True)
class Family:
    """One family of checkpoints: a module of this folder defines it as `FAMILY`."""

    architectures: tuple[str, ...]  # config.json's "architectures"
    read: ReadConfig
    weights: WeightTable


def read_decoder(
    reader: Reader, attentions: Sequence[GQAConfig], ffn: FFNConfig, *, max_positions: int, norm_eps: float
) -> ModelConfig:
    """The whole model, every layer with the same feed-forward. Keyword arguments: transformers' defaults."""
    positions = reader.integer("max_position_embeddings", default=max_positions)
    return ModelConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        # Vicuna's 16k models give the context that position interpolation reaches under this name.
        max_positions=max(positions, reader.integer("max_sequence_length", default=positions)),
        norm_eps=reader.number("rms_norm_eps", default=norm_eps),
        tie_embeddings=reader.boolean("tie_word_embeddings", default=False),
        layers=tuple(LayerConfig(attention, ffn) for attention in attentions),
    )


def read_attention(reader: Reader, *, rope_theta: float, kv_heads: int | None = None, **options: Any) -> GQAConfig:
    """Grouped-query attention; transformers' defaults: `rope_theta`, `kv_heads` (None: one per head)."""
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=kv_heads or heads, null=heads)
    if heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"num_attention_heads = {heads} is not a multiple of it")
    size = reader.integer("head_dim", default=None, null=None)
    if size is None:
        hidden = reader.integer("hidden_size")
        if hidden % heads:
            raise reader.refusal("num_attention_heads", f"hidden_size = {hidden} is not a multiple of it")
        size = hidden // heads
    if size % 2:
        raise reader.refusal("head_dim", f"RoPE rotates pairs, and the head size {size} is odd")
    return GQAConfig(heads, kv_heads, size, read_rope(reader, size, rope_theta), **options)


def read_experts(reader: Reader, **defaults: int) -> tuple[int, int]:
    """(experts, experts per token). Keyword arguments: transformers' defaults, by the key they stand for."""
    experts, top_k = (
        reader.integer(key, default=defaults.get(key, REQUIRED)) for key in ("num_local_experts", "num_experts_per_tok")
    )
    if top_k > experts:
        raise reader.refusal("num_experts_per_tok", f"there are only {experts} experts")
    return experts, top_k


def read_rope(reader: Reader, dim: int, default_theta: float) -> RopeConfig:
    """RoPE in both spellings: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    parameters, scaling = reader.object("rope_parameters"), reader.object("rope_scaling")
    if parameters is not None and scaling is not None:
        raise reader.refusal("rope_scaling", "rope_parameters is given too")
    theta = reader.number("rope_theta", default=default_theta)
    if parameters is not None:
        theta = parameters.number("rope_theta", default=theta)
    found = parameters or scaling
    return RopeConfig(theta, dim, scaling=None if found is None else _read_scaling(found))


def _read_scaling(reader: Reader) -> RopeScaling | None:
    key = "type" if "type" in reader and "rope_type" not in reader else "rope_type"
    kind = reader.only(key, "default", "linear", "llama3", default="default")
    reader.only("type", kind)  # some files give both
    if kind == "linear":
        return LinearScaling(reader.number("factor"))
    if kind == "llama3":
        low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
        if low >= high:
            raise reader.refusal("low_freq_factor", f"high_freq_factor = {high} is not larger")
        return Llama3Scaling(reader.number("factor"), low, high, reader.integer("original_max_position_embeddings"))
    return None


ATTENTION = (
    Rule("layers.{i}.attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",), None),
    Rule(
        "layers.{i}.attention.qkv.weight",
        (
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        0,
    ),
    Rule(
        "layers.{i}.attention.qkv.bias",
        (
            "model.layers.{i}.self_attn.q_proj.bias",
            "model.layers.{i}.self_attn.k_proj.bias",
            "model.layers.{i}.self_attn.v_proj.bias",
        ),
        0,
    ),
    Rule("layers.{i}.attention.out.weight", ("model.layers.{i}.self_attn.o_proj.weight",), 1),
    Rule("layers.{i}.attention.out.bias", ("model.layers.{i}.self_attn.o_proj.bias",), None),
    Rule("layers.{i}.ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",), None),
)

MLP = (
    Rule(
        "layers.{i}.ffn.gate_up.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        0,
    ),
    Rule(
        "layers.{i}.ffn.gate_up.bias",
        ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        0,
    ),
    Rule("layers.{i}.ffn.down.weight", ("model.layers.{i}.mlp.down_proj.weight",), 1),
    Rule("layers.{i}.ffn.down.bias", ("model.layers.{i}.mlp.down_proj.bias",), None),
)

ENDS = (
    Rule("embedding.weight", ("model.embed_tokens.weight",), 0),
    Rule("norm.weight", ("model.norm.weight",), None),
    Rule("head.weight", ("lm_head.weight",), 0),
)

SKIP = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",  # old checkpoints; computed from the configuration
    "model.rotary_emb.inv_freq",
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)  # where the head has no parameter for the rule above


def weight_table(*rules: Rule) -> WeightTable:
    """The rules every family here has, and `rules` for its feed-forward."""
    return WeightTable((*ENDS, *ATTENTION, *rules), SKIP, TIED)
