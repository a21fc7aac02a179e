"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2's attention, many small experts, and a gated shared one."""

from __future__ import annotations

from dataclasses import replace

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import EXPERTS, read_softmax_experts, read_sparse_layers, shared_expert
from pyllama.architectures.qwen import read_qwen_windows
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "qwen2_moe")
    layers = reader.layers()
    positions = read_positions(reader, 32768)
    bias = reader.boolean("qkv_bias", default=True)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, kv_heads=16, qkv_bias=bias)
    # Not as in Qwen2: every other layer of the first ones.
    attentions = read_qwen_windows(reader, attention, layers, lambda layer, bound: layer % 2 == 0 and layer < bound)
    shared = MLPConfig(reader.integer("shared_expert_intermediate_size"))
    moe = replace(read_softmax_experts(reader, "num_experts", experts=60, top_k=4), shared=shared, shared_gate=True)
    ffns = read_sparse_layers(reader, layers, MLPConfig(reader.integer("intermediate_size")), moe)
    return read_decoder(reader, attentions, ffns, positions=positions, norm_eps=1e-6)


FAMILY = Family(("Qwen2MoeForCausalLM",), read, weight_table(*EXPERTS, *shared_expert("shared_expert")))
