"""Tiny random checkpoints of each family, in many configurations, made by transformers where it has the family."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 500_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,  # the tests' sequences are longer
    },
]


def draw(family: str, seed: int) -> dict[str, Any]:
    """A random configuration of the family, in transformers' own keys."""
    pick = random.Random(f"{family} {seed}").choice
    kv_heads = pick([1, 2, 3])
    config = {
        "model_type": family,
        "vocab_size": 211,
        "hidden_size": pick([48, 96]),
        "intermediate_size": pick([40, 72]),
        "num_hidden_layers": pick([1, 2, 3]),
        "num_attention_heads": kv_heads * pick([1, 2, 4] if kv_heads < 3 else [1, 2]),
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": pick([1e-5, 1e-6]),
        "tie_word_embeddings": pick([False, True]),
        "rope_parameters": dict(pick(ROPES)),
        "head_dim": pick([None, 8, 20, 32]),
        "eos_token_id": None,
    }
    if config["hidden_size"] % config["num_attention_heads"] or config["hidden_size"] // kv_heads % 2:
        config["head_dim"] = config["head_dim"] or 16
    if family == "llama":
        config |= {"attention_bias": pick([False, True]), "mlp_bias": pick([False, True])}
    else:
        config["sliding_window"] = [None, 7, 64][seed % 3]
    if family == "mixtral":
        experts = pick([1, 2, 5, 8])
        config |= {"num_local_experts": experts, "num_experts_per_tok": pick(range(1, experts + 1))}
    return config


def write(folder: Path, config: dict[str, Any], seed: int = 0, shard_size: str = "5GB") -> PreTrainedModel:
    """Saves a random checkpoint; returns transformers' float32 model of it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    randomize(model.state_dict())
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def randomize(weights: dict[str, Tensor]) -> None:
    """Weights that let every part matter: outputs of about unit size, biases, norms that differ from one."""
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5)
        elif "embed" in name or name.endswith("bias"):
            weight.normal_()
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5)


def old_spelling(folder: Path) -> None:
    """Rewrites config.json as transformers 4 and earlier would: rope_theta and rope_scaling, torch_dtype."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps(config))


def write_llama_moe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A random checkpoint of llama_moe, pyllama's own family, which transformers does not have."""
    D, K, shared = 48, 16, 56
    config = {
        "architectures": ["LlamaMoeForCausalLM"],
        "model_type": "llama_moe",
        "vocab_size": 211,
        "hidden_size": D,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": shared,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": K,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    } | changes
    shapes = {"model.embed_tokens.weight": (211, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (211, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (D,), layer + "post_attention_layernorm.weight": (D,)}
        for part, shape in {"q": (4 * K, D), "k": (2 * K, D), "v": (2 * K, D), "o": (D, 4 * K)}.items():
            shapes[f"{layer}self_attn.{part}_proj.weight"] = shape
        shapes[layer + "mlp.gate.weight"] = (config["num_local_experts"], D)
        experts = {f"experts.{e}": config["moe_intermediate_size"] for e in range(config["num_local_experts"])}
        for expert, size in (experts | {"shared_expert": shared}).items():
            for part, shape in {"gate": (size, D), "up": (size, D), "down": (D, size)}.items():
                shapes[f"{layer}mlp.{expert}.{part}_proj.weight"] = shape
    torch.manual_seed(0)
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomize(weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return config
