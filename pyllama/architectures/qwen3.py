"""Qwen3 (arXiv:2505.09388): Llama's layers with a norm of each head's query and key, and no biases."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.qwen import read_qwen_windows
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "qwen3")
    layers = reader.layers()
    positions = read_positions(reader, 32768)
    bias = reader.boolean("attention_bias", default=False)
    attention = read_attention(
        reader,
        positions=positions,
        rope_theta=10_000.0,
        kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
    )
    attentions = read_qwen_windows(reader, attention, layers, lambda layer, bound: layer >= bound)
    ffn = MLPConfig(reader.integer("intermediate_size"))
    return read_decoder(reader, attentions, [ffn] * layers, positions=positions, norm_eps=1e-6)


FAMILY = Family(("Qwen3ForCausalLM",), read, weight_table())
