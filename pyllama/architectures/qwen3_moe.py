"""Qwen3-MoE (arXiv:2505.09388): Qwen3's attention with a mixture of experts in all or some layers."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import EXPERTS, read_softmax_experts, read_sparse_layers
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "qwen3_moe")
    # Qwen3-Coder spells out what transformers does not know, and which is so in every model of the family.
    for key, value in {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}.items():
        reader.only(key, value)
    layers = reader.layers()
    positions = read_positions(reader, 32768)
    bias = reader.boolean("attention_bias", default=False)
    attention = read_attention(
        reader,
        positions=positions,
        rope_theta=10_000.0,
        kv_heads=4,
        window=_read_window(reader),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
    )
    # transformers 5 writes num_local_experts, the publisher num_experts.
    key = "num_local_experts" if "num_local_experts" in reader else "num_experts"
    moe = read_softmax_experts(reader, key, experts=128, top_k=8)
    ffns = read_sparse_layers(reader, layers, MLPConfig(reader.integer("intermediate_size")), moe)
    return read_decoder(reader, [attention] * layers, ffns, positions=positions, norm_eps=1e-6)


def _read_window(reader: Reader) -> int | None:
    """Of all layers: transformers does not know `max_window_layers` here, which the publisher's files have."""
    if reader.boolean("use_sliding_window", default=False):
        reader.only("max_window_layers", 0, None)
        window: int | None = reader.integer("sliding_window", default=4096, null=None)
        return window
    reader.anything("max_window_layers")
    reader.anything("sliding_window")
    return None


FAMILY = Family(("Qwen3MoeForCausalLM",), read, weight_table(*EXPERTS))
