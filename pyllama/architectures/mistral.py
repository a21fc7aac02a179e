"""Mistral 7B and its relatives (Jiang et al., arXiv:2310.06825): Llama's layers with a sliding window.

Ministral alternates layers with and without the window (`layer_types`).
"""

from __future__ import annotations

from dataclasses import replace

from pyllama.architectures.common import (
    Family,
    read_attention,
    read_decoder,
    read_positions,
    read_windows,
    weight_table,
)
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "mistral", "ministral")
    layers = reader.layers()
    window = reader.integer("sliding_window", default=4096, null=None)
    positions = read_positions(reader, 131072)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, kv_heads=8)
    windows = read_windows(reader, layers, window, lambda layer: True)
    ffn = MLPConfig(reader.integer("intermediate_size"))
    attentions = [replace(attention, window=window) for window in windows]
    return read_decoder(reader, attentions, [ffn] * layers, positions=positions, norm_eps=1e-6)


FAMILY = Family(("MistralForCausalLM", "MinistralForCausalLM"), read, weight_table())
