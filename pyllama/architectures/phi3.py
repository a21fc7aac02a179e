"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv:2404.14219, arXiv:2412.08905): Llama's layers, their products packed."""

from __future__ import annotations

from pyllama.architectures.common import (
    Family,
    read_attention,
    read_decoder,
    read_dropout,
    read_positions,
    weight_table,
)
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig
from pyllama.weights import Rule


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "phi3")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):  # written by the publisher, unknown to transformers
        reader.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        reader.only(key, 1)
    positions, original = read_positions(reader, 4096), 4096
    reader.integer("original_max_position_embeddings", default=original)  # without a scaling it has no meaning
    attention = read_attention(
        reader,
        positions=positions,
        rope_theta=10_000.0,
        rotated=1.0,
        original=original,
        window=reader.integer("sliding_window", default=None, null=None),
        out_dropout=(dropout := read_dropout(reader, "resid_pdrop")),
    )
    ffn = MLPConfig(reader.integer("intermediate_size"), dropout=dropout)
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-5)


FAMILY = Family(
    ("Phi3ForCausalLM",),
    read,
    weight_table(
        Rule("layers.{i}.attention.qkv.weight", ("model.layers.{i}.self_attn.qkv_proj.weight",), 0),
        Rule("layers.{i}.ffn.gate_up.weight", ("model.layers.{i}.mlp.gate_up_proj.weight",), 0),
    ),
)
