"""Mistral 7B and its relatives (Jiang et al., arXiv:2310.06825): Llama's layers with a sliding window.

Ministral alternates layers with and without the window (`layer_types`). Mistral's own files (params.json beside
consolidated.safetensors) have Meta's names (github.com/mistralai/mistral-inference).
"""

from __future__ import annotations

from typing import Any

from pyllama.architectures.common import (
    Dialect,
    Family,
    read_attention,
    read_decoder,
    read_positions,
    read_windows,
    weight_table,
)
from pyllama.architectures.meta import read_common, weights
from pyllama.architectures.reader import Reader
from pyllama.config import MLPConfig, ModelConfig


def read(reader: Reader) -> ModelConfig:
    reader.only("model_type", "mistral", "ministral")
    layers = reader.layers()
    window = reader.integer("sliding_window", default=4096, null=None)
    positions = read_positions(reader, 131072)
    attention = read_attention(reader, positions=positions, rope_theta=10_000.0, kv_heads=8)
    attentions = read_windows(reader, attention, layers, window, lambda layer: True)
    ffn = MLPConfig(reader.integer("intermediate_size"))
    return read_decoder(reader, attentions, [ffn] * layers, positions=positions, norm_eps=1e-6)


def translate(reader: Reader) -> dict[str, Any]:
    """Of Mistral's own keys; those of models with vision, LoRA or several windows are refused as unknown."""
    reader.only("model_type", "transformer")
    reader.anything("max_batch_size")
    window = reader.integer("sliding_window", default=None, null=None)
    theta = 1_000_000.0 if window is None else 10_000.0  # the first model alone had a window
    moe = reader.object("moe")
    family: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if moe is not None:
        family = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": moe.integer("num_experts"),
            "num_experts_per_tok": moe.integer("num_experts_per_tok"),
        }
    return {
        **family,
        **read_common(reader),
        "head_dim": reader.integer("head_dim"),
        "intermediate_size": reader.integer("hidden_dim"),
        "sliding_window": window,
        "max_position_embeddings": reader.integer("max_seq_len", default=32768),
        "rope_theta": reader.number("rope_theta", default=theta, null=theta),
        "tie_word_embeddings": False,
    }


FAMILY = Family(("MistralForCausalLM", "MinistralForCausalLM"), read, weight_table())
DIALECT = Dialect(frozenset({"dim", "n_layers", "n_heads", "head_dim", "hidden_dim"}), translate, weights)
