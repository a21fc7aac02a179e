"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama's layers with biases of queries, keys and values."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.qwen import read_qwen_windows
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "qwen2")
    reader.only("use_mrope", False)  # the vision models' RoPE
    layers = reader.layers()
    positions = read_positions(reader, 32768)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, kv_heads=32, qkv_bias=True)
    attentions = read_qwen_windows(reader, attention, layers, lambda layer, bound: layer >= bound)
    ffn = MLPConfig(reader.integer("intermediate_size"))
    return read_decoder(reader, attentions, [ffn] * layers, positions=positions, norm_eps=1e-6)


FAMILY = Family(("Qwen2ForCausalLM",), read, weight_table())
