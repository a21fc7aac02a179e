"""GLM-4.5 and GLM-4.6 (arXiv:2508.06471): DeepSeek-V3's router and shared experts with grouped-query attention."""

from __future__ import annotations

from pyllama.architectures.common import (
    Family,
    read_attention,
    read_decoder,
    read_experts,
    read_positions,
    weight_table,
)
from pyllama.architectures.experts import EXPERTS, read_dense_first, read_groups, read_shared, shared_expert
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig, MoEConfig


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
    experts, top_k = read_experts(reader, "n_routed_experts", experts=128, top_k=8)
    groups, chosen = read_groups(reader, experts, top_k, groups=1, chosen=1)
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("moe_intermediate_size"),
        scoring="sigmoid",
        renormalize=reader.boolean("norm_topk_prob", default=True),
        scale=reader.number("routed_scaling_factor", default=1.0),
        correction_bias=True,
        num_groups=groups,
        top_groups=chosen,
        group_top_k=min(2, experts // groups),
        float32_router=True,
        shared=read_shared(reader, default=1),
    )
    mlp = MLPConfig(reader.integer("intermediate_size"))
    return read_decoder(
        reader,
        [attention] * layers,
        read_dense_first(reader, layers, mlp, moe, dense=1),
        positions=positions,
        norm_eps=1e-5,
        extra_layers=reader.integer("num_nextn_predict_layers", default=1, zero=True),
    )


FAMILY = Family(("Glm4MoeForCausalLM",), read, weight_table(*EXPERTS, *shared_expert("shared_experts")))
