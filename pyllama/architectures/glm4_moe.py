"""GLM-4.5 and GLM-4.6 (arXiv:2508.06471): DeepSeek-V3's router and shared experts with grouped-query attention."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import EXPERTS, read_corrected_experts, read_dense_first, shared_expert
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "glm4_moe")
    layers = reader.layers()
    positions = read_positions(reader, 131072)
    attention = read_attention(
        reader,
        positions=positions,
        rope_theta=10_000.0,
        kv_heads=8,
        rotated=0.5,
        qkv_bias=reader.boolean("attention_bias", default=False),
        qk_norm="head" if reader.boolean("use_qk_norm", default=False) else None,
    )
    moe = read_corrected_experts(reader, experts=128, groups=1, chosen=1, scale=1.0)
    mlp = MLPConfig(reader.integer("intermediate_size"))
    return read_decoder(
        reader,
        [attention] * layers,
        read_dense_first(reader, layers, mlp, moe, dense=1),
        positions=positions,
        norm_eps=1e-5,
        extra_layers=reader.extra_layers(default=1),
    )


FAMILY = Family(("Glm4MoeForCausalLM",), read, weight_table(*EXPERTS, *shared_expert("shared_experts")))
