"""OLMoE (Muennighoff et al., arXiv:2409.02060): queries and keys are normalised over all heads at once."""

from __future__ import annotations

from pyllama.architectures.common import (
    Family,
    read_attention,
    read_decoder,
    read_experts,
    read_positions,
    weight_table,
)
from pyllama.architectures.experts import EXPERTS
from pyllama.architectures.reader import Reader
from pyllama.config import ModelConfig, MoEConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "olmoe")
    positions = read_positions(reader, 4096)
    bias = reader.boolean("attention_bias", default=False)
    attention = read_attention(
        reader,
        positions=positions,
        rope_theta=10_000.0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="whole",
        clip=reader.number("clip_qkv", default=None, null=None),
    )
    experts, top_k = read_experts(reader, "num_experts", experts=64, top_k=8)
    ffn = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("intermediate_size"),
        renormalize=reader.boolean("norm_topk_prob", default=False),
        aux_loss_coef=reader.number("router_aux_loss_coef", default=0.01, zero=True),
    )
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-5)


FAMILY = Family(("OlmoeForCausalLM",), read, weight_table(*EXPERTS))
