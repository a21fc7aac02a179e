"""Llama's attention with a mixture of experts and an ungated shared expert: the embedded demo's family.

The feed-forward is a shared SwiGLU expert, which every token passes through (none where its size is null), plus the
weighted sum of the `num_experts_per_tok` experts that a softmax router prefers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pyllama.architectures.common import Family, read_attention, read_decoder, read_positions, weight_table
from pyllama.architectures.experts import EXPERTS, read_softmax_experts, shared_expert
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "llama_moe")
    bias = reader.boolean("attention_bias", default=False)
    positions = read_positions(reader, 2048)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, qkv_bias=bias, out_bias=bias)
    shared = reader.integer("shared_expert_intermediate_size", null=None)
    ffn = replace(
        read_softmax_experts(reader, "num_local_experts", renormalize=True),
        shared=None if shared is None else MLPConfig(shared),
        aux_loss=_LOSSES[reader.boolean("seq_aux", default=None, null=None)],
    )
    layers = reader.layers()
    return read_decoder(reader, [attention] * layers, [ffn] * layers, positions=positions, norm_eps=1e-6)


# DeepSeek's key of which load-balancing loss a model is trained with; without it Mixtral's.
_LOSSES: dict[bool | None, Literal["switch", "sequence", "batch"]] = {None: "switch", True: "sequence", False: "batch"}
FAMILY = Family(("LlamaMoeForCausalLM",), read, weight_table(*EXPERTS, *shared_expert("shared_expert")))
