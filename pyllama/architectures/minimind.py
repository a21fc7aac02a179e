"""Small research models in Meta's names with a plain configuration: MiniMind 1 and 2 (github.com/jingyaogong/minimind).

They are Llama, or where `use_moe` is set this package's llama_moe.
"""

from __future__ import annotations

from typing import Any

from pyllama.architectures.common import Dialect
from pyllama.architectures.meta import feed_forward_size, read_common, weights
from pyllama.architectures.reader import Reader

MOE_KEYS = (
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "scoring_func",
    "aux_loss_alpha",
    "seq_aux",
    "norm_topk_prob",
)


def translate(reader: Reader) -> dict[str, Any]:
    reader.only("model_type", "minimind", "MateConv")  # the second in a fork's files
    for key in ("auto_map", "dropout", "flash_attn"):  # code that is not needed, training, speed
        reader.anything(key)
    size = feed_forward_size(reader, multiple_of=64)
    size = reader.integer("hidden_dim", default=size, null=size)
    family = _moe(reader, size) if reader.boolean("use_moe") else _dense(reader, size)
    return {
        **family,
        **read_common(reader),
        "max_position_embeddings": reader.integer("max_seq_len", default=512),
        "rope_theta": float(reader.number("rope_theta", default=10_000.0)),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", default=True),
        **{key: reader.anything(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in reader},
    }


def _dense(reader: Reader, size: int) -> dict[str, Any]:
    for key in MOE_KEYS:  # they are always there
        reader.anything(key)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": size}


def _moe(reader: Reader, size: int) -> dict[str, Any]:
    reader.only("scoring_func", "softmax")
    top_k = reader.integer("num_experts_per_tok", default=2)
    # Whatever number is given, 0 and false included, the model has one shared expert; only null means none.
    shared = "n_shared_experts" not in reader or reader.anything("n_shared_experts") is not None
    return {
        "architectures": ["LlamaMoeForCausalLM"],
        "model_type": "llama_moe",
        "num_local_experts": reader.integer("n_routed_experts", default=4),
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": size if shared else None,
        # The weight of a single expert stays its probability.
        "norm_topk_prob": reader.boolean("norm_topk_prob", default=True) and top_k > 1,
        "seq_aux": reader.boolean("seq_aux", default=True),
        "router_aux_loss_coef": reader.number("aux_loss_alpha", default=0.01, zero=True),
    }


DIALECT = Dialect(frozenset({"dim", "n_layers", "n_heads", "use_moe"}), translate, weights, "MiniMindLM")
