"""Llama 1 to 3.3 (Touvron et al., arXiv:2302.13971, arXiv:2307.09288; Grattafiori et al., arXiv:2407.21783).

Many others have the same layers: Vicuna, CodeLlama, Yi, TinyLlama, SmolLM, DeepSeek's first models.
"""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "llama")
    reader.only("sliding_window", None)
    bias = reader.boolean("attention_bias", default=False)
    positions = read_positions(reader, 2048)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, qkv_bias=bias, out_bias=bias)
    ffn = MLPConfig(reader.integer("intermediate_size"), reader.boolean("mlp_bias", default=False))
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-6)


FAMILY = Family(("LlamaForCausalLM",), read, weight_table())
