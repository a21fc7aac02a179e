"""Mixtral (Jiang et al., arXiv:2401.04088): Mistral's layers with a mixture of experts as feed-forward."""

from __future__ import annotations

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import read_experts
from pyllama.architectures.reader import Reader
from pyllama.config import ModelConfig, MoEConfig
from pyllama.weights import Rule


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "mixtral")
    window = reader.integer("sliding_window", default=None, null=None)
    positions = read_positions(reader, 131072)
    attention = read_attention(reader, positions=positions, rope_theta=1_000_000.0, kv_heads=8, window=window)
    experts, top_k = read_experts(reader, "num_local_experts", experts=8, top_k=2)
    ffn = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        size=reader.integer("intermediate_size"),
        aux_loss_coef=reader.number("router_aux_loss_coef", default=0.001, zero=True),
    )
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-5)


FAMILY = Family(
    ("MixtralForCausalLM",),
    read,
    weight_table(
        Rule("layers.{i}.ffn.router.weight", ("model.layers.{i}.block_sparse_moe.gate.weight",), None),
        Rule(
            "layers.{i}.ffn.gate_up",
            (
                "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
                "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
            ),
            1,
        ),
        Rule("layers.{i}.ffn.down", ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",), 2),
    ),
)
