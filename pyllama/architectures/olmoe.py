"""OLMoE (Muennighoff et al., arXiv:2409.02060): queries and keys are normalised over all heads at once."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import EXPERTS, read_softmax_experts
from pyllama.architectures.reader import Reader
from pyllama.config import ModelConfig


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
    ffn = read_softmax_experts(reader, "num_experts", experts=64, top_k=8, size="intermediate_size", aux_loss_coef=0.01)
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-5)


FAMILY = Family(("OlmoeForCausalLM",), read, weight_table(*EXPERTS))
