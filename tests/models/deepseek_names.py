"""A Hugging Face checkpoint of a DeepSeek model as DeepSeek's own code has it (github.com/deepseek-ai/DeepSeek-V3,
inference/): its configuration, the names of its tensors, and the pieces in which its convert.py spreads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
# The beginning of a name in Hugging Face's files; DeepSeek's; the dimension that is split between ranks.
NAMES = [
    ("model.embed_tokens", "embed", 0),
    ("model.norm", "norm", None),
    ("lm_head", "head", 0),
    (r"model.(layers.\d+.)input_layernorm", r"\1attn_norm", None),
    (r"model.(layers.\d+.)post_attention_layernorm", r"\1ffn_norm", None),
    (r"model.(layers.\d+.)self_attn.q_proj", r"\1attn.wq", 0),
    (r"model.(layers.\d+.)self_attn.q_a_proj", r"\1attn.wq_a", None),
    (r"model.(layers.\d+.)self_attn.q_a_layernorm", r"\1attn.q_norm", None),
    (r"model.(layers.\d+.)self_attn.q_b_proj", r"\1attn.wq_b", 0),
    (r"model.(layers.\d+.)self_attn.kv_a_proj_with_mqa", r"\1attn.wkv_a", None),
    (r"model.(layers.\d+.)self_attn.kv_a_layernorm", r"\1attn.kv_norm", None),
    (r"model.(layers.\d+.)self_attn.kv_b_proj", r"\1attn.wkv_b", 0),
    (r"model.(layers.\d+.)self_attn.o_proj", r"\1attn.wo", 1),
    (r"model.(layers.\d+.)mlp.gate.e_score_correction_", r"\1ffn.gate.", None),
    (r"model.(layers.\d+.)mlp.gate\b", r"\1ffn.gate", None),
    (r"model.(layers.\d+.)mlp.((?:shared_experts.)?)gate_proj", r"\1ffn.\2w1", 0),
    (r"model.(layers.\d+.)mlp.((?:shared_experts.)?)down_proj", r"\1ffn.\2w2", 1),
    (r"model.(layers.\d+.)mlp.((?:shared_experts.)?)up_proj", r"\1ffn.\2w3", 0),
    (r"model.(layers.\d+.)mlp.(experts.\d+.)gate_proj", r"\1ffn.\2w1", None),
    (r"model.(layers.\d+.)mlp.(experts.\d+.)down_proj", r"\1ffn.\2w2", None),
    (r"model.(layers.\d+.)mlp.(experts.\d+.)up_proj", r"\1ffn.\2w3", None),
]


def write_own(source: Path, folder: Path, ranks: int = 1) -> None:
    """Writes the checkpoint in `source` with DeepSeek's names into `folder`, in a file for each rank."""
    config = json.loads((source / "config.json").read_text())
    weights = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    pieces: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in weights.items():
        own, dim = own_name(name)
        expert = re.search(r"\.experts\.(\d+)\.", own)
        for rank in range(ranks):
            if expert is None or int(expert[1]) * ranks // config["n_routed_experts"] == rank:
                pieces[rank][own] = tensor if dim is None else tensor.chunk(ranks, dim)[rank].contiguous()
    folder.mkdir()
    for rank, piece in enumerate(pieces):
        save_file(piece, folder / f"model{rank}-mp{ranks}.safetensors")
    (folder / "config.json").write_text(json.dumps(own_config(config)))


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    own = {key: config[theirs] for key, theirs in KEYS.items()}
    own |= {"q_lora_rank": config["q_lora_rank"] or 0, "rope_theta": rope["rope_theta"]}
    own["score_func"] = "sigmoid" if config["model_type"] == "deepseek_v3" else "softmax"
    if rope["rope_type"] == "yarn":
        own |= {"original_seq_len": rope["original_max_position_embeddings"], "rope_factor": rope["factor"]}
        own |= {"mscale": rope["mscale"], "max_seq_len": config["max_position_embeddings"]}
    else:
        own["max_seq_len"] = own["original_seq_len"] = config["max_position_embeddings"]
    return own


def own_name(name: str) -> tuple[str, int | None]:
    for theirs, own, dim in NAMES:
        if re.match(theirs, name):
            return re.sub(theirs, own, name, count=1).replace("weight_scale_inv", "scale"), dim
    raise KeyError(name)
