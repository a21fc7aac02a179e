"""DeepSeek's own names and keys of its V2 and V3 models, as its inference code has them (inference/model.py of
github.com/deepseek-ai/DeepSeek-V3; defaults are those of its `ModelArgs`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyllama.architectures import deepseek_v2
from pyllama.architectures.common import Dialect
from pyllama.architectures.reader import Reader
from pyllama.config import ModelConfig
from pyllama.weights import BlockScales, WeightTable


def translate(reader: Reader) -> dict[str, Any]:
    """The same in Hugging Face's keys: with softmax it is a DeepSeek-V2, with sigmoid a DeepSeek-V3.

    DeepSeek's code gives the router a correction bias, and scores groups by two experts, where `dim` is V3's 7168.
    Here it is where score_func is sigmoid, and a checkpoint that does not agree lacks a tensor or has one too many.
    """
    sigmoid = reader.only("score_func", "softmax", "sigmoid", default="softmax") == "sigmoid"
    groups = reader.integer("n_expert_groups", default=1)
    for key in ("max_batch_size", "scale_fmt"):  # of its cache; how its kernels round activations
        reader.anything(key)
    config = {
        "architectures": [f"DeepseekV{3 if sigmoid else 2}ForCausalLM"],
        "topk_method": "noaux_tc" if sigmoid else "greedy" if groups == 1 else "group_limited_greedy",
        "norm_topk_prob": sigmoid,
        "n_group": groups,
        "topk_group": reader.integer("n_limited_groups", default=1),
        "routed_scaling_factor": reader.number("route_scale", default=1.0),
        "q_lora_rank": reader.integer("q_lora_rank", default=0, zero=True) or None,
        "first_k_dense_replace": reader.integer("n_dense_layers", default=1, zero=True),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": reader.integer("max_seq_len", default=16384),
        "rope_parameters": _rope(reader),
    }
    return config | {theirs: reader.integer(key, default=default) for key, (theirs, default) in _SIZES.items()}


def _rope(reader: Reader) -> dict[str, Any]:
    theta = reader.number("rope_theta", default=10_000.0)
    original = reader.integer("original_seq_len", default=4096)
    factor, mscale = reader.number("rope_factor", default=40), reader.number("mscale", default=1.0, zero=True)
    fast, slow = reader.number("beta_fast", default=32), reader.number("beta_slow", default=1)
    if factor < 1:
        raise reader.refusal("rope_factor", "YaRN makes contexts longer")
    if reader.integer("max_seq_len", default=16384) <= original:
        return {"rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "attention_factor": 1.0,  # queries and keys are turned, not stretched: all of mscale is in the scores
    }


def weights(config: ModelConfig) -> WeightTable:
    rules = deepseek_v2.weights(config).rules
    renamed = tuple(replace(rule, sources=tuple(map(_renamed, rule.sources))) for rule in rules)
    return WeightTable(renamed, scales=BlockScales(128, 128, "scale"))


def _renamed(name: str) -> str:
    return ".".join(_NAMES.get(part, part) for part in name.removeprefix("model.").split("."))


_SIZES = {  # key: (Hugging Face's, default)
    "vocab_size": ("vocab_size", 102400),
    "dim": ("hidden_size", 2048),
    "inter_dim": ("intermediate_size", 10944),
    "moe_inter_dim": ("moe_intermediate_size", 1408),
    "n_layers": ("num_hidden_layers", 27),
    "n_heads": ("num_attention_heads", 16),
    "n_routed_experts": ("n_routed_experts", 64),
    "n_shared_experts": ("n_shared_experts", 2),
    "n_activated_experts": ("num_experts_per_tok", 6),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}
_NAMES = {  # a part of a tensor's name: DeepSeek's for Hugging Face's
    "self_attn": "attn",
    "mlp": "ffn",
    "embed_tokens": "embed",
    "lm_head": "head",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "e_score_correction_bias": "bias",
}
DIALECT = Dialect(frozenset({"dim", "n_layers", "kv_lora_rank", "qk_rope_head_dim"}), translate, weights)
