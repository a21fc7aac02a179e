"""Tiny random checkpoints of each family, in many configurations, made by transformers where it has the family."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
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
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "rope_theta": 500_000.0,
        "factor": 2.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
]
EXPERTS = [1, 2, 5, 8]
# Experts, groups of them, groups that a token may choose from.
GROUPS = [(2, 1, 1), (5, 1, 1), (8, 2, 1), (8, 4, 2), (8, 2, 2), (12, 3, 2), (6, 3, 1)]


def draw(family: str, seed: int) -> dict[str, Any]:
    """A random configuration of the family, in transformers' own keys."""
    chance = random.Random(f"{family}-{seed}")
    pick = chance.choice
    kv_heads = pick([1, 2, 3])
    hidden = pick([48, 96])
    heads = kv_heads * pick([1, 2, 4] if kv_heads < 3 else [1, 2])
    config = {
        "model_type": family,
        "vocab_size": 211,
        "hidden_size": hidden,
        "intermediate_size": pick([40, 72]),
        "num_hidden_layers": pick([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": pick([1e-5, 1e-6]),
        "tie_word_embeddings": pick([False, True]),
        "rope_parameters": dict(ROPES[seed % len(ROPES)]),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if size := pick([None, 8, 20, 32]):
        config["head_dim"] = size
    return config | OPTIONS[family](config, chance)


def _windows(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Qwen's."""
    layers, on = config["num_hidden_layers"], chance.random() < 0.6
    kinds = [chance.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
    return {
        "use_sliding_window": on,
        "sliding_window": chance.choice([7, 64]),
        "max_window_layers": chance.choice([0, 1, 2, 28]),
        "layer_types": kinds if on and chance.random() < 0.3 else None,
    }


def _experts(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Qwen's and OLMoE's."""
    experts = chance.choice(EXPERTS)
    return {
        "num_experts": experts,
        "num_experts_per_tok": chance.randint(1, experts),
        "norm_topk_prob": chance.choice([False, True]),
    }


def _sparse(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Qwen's: which layers have experts."""
    return _experts(config, chance) | {
        "moe_intermediate_size": chance.choice([24, 32]),
        "decoder_sparse_step": chance.choice([1, 1, 2]),
        "mlp_only_layers": chance.choice([None, [], [0], [1], [0, 1, 2]]),
    }


def _llama(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return {"attention_bias": chance.choice([False, True]), "mlp_bias": chance.choice([False, True])}


def _mistral(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return {"sliding_window": chance.choice([None, 7, 64])}


def _mixtral(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    experts = chance.choice(EXPERTS)
    if config["rope_parameters"]["rope_type"] == "yarn":  # where transformers does not derive the head size
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return _mistral(config, chance) | {"num_local_experts": experts, "num_experts_per_tok": chance.randint(1, experts)}


def _phi3(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    config.pop("head_dim", None)  # transformers checks LongRoPE's factors against the quotient
    size = config["hidden_size"] // config["num_attention_heads"]
    factor = chance.choice([part for part in (1.0, 0.75, 0.5) if int(size * part) % 2 == 0])
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": factor}
    if kind := chance.choice([None, "longrope", "longrope"]):
        pairs = int(size * factor) // 2
        rope |= {
            "rope_type": kind,
            "short_factor": [round(chance.uniform(1, 1.3), 3) for _ in range(pairs)],
            "long_factor": [round(chance.uniform(1, 6), 3) for _ in range(pairs)],
        }
        rope |= chance.choice([{}, {}, {"attention_factor": 0.9}])
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": chance.choice([40, 128, 256]),
        "sliding_window": chance.choice([None, 7, 64]),
    }


def _qwen3(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    size = config["hidden_size"] // config["num_attention_heads"]
    return {"head_dim": size} | config | _windows(config, chance) | {"attention_bias": chance.choice([False, True])}


def _qwen3_moe(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return _sparse(config, chance) | {
        "attention_bias": chance.choice([False, True]),
        "use_sliding_window": chance.choice([False, True]),
        "sliding_window": chance.choice([7, 64]),
    }


def _qwen2_moe(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return {
        **_sparse(config, chance),
        **_windows(config, chance),
        "qkv_bias": chance.choice([False, True]),
        "shared_expert_intermediate_size": chance.choice([16, 40]),
    }


def _olmoe(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    config.pop("head_dim", None)  # transformers' norms have the hidden size
    return _experts(config, chance) | {
        "attention_bias": chance.choice([False, True]),
        "clip_qkv": chance.choice([None, 0.4, 1.5]),
    }


def _glm4_moe(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    config.setdefault("head_dim", 16)
    config["rope_parameters"]["partial_rotary_factor"] = chance.choice([0.5, 0.5, 1.0])
    experts, groups, chosen = chance.choice(GROUPS)
    return {
        "attention_bias": chance.choice([False, True]),
        "use_qk_norm": chance.choice([False, True]),
        "n_routed_experts": experts,
        "n_group": groups,
        "topk_group": chosen,
        "num_experts_per_tok": chance.randint(1, chosen * experts // groups),
        "n_shared_experts": chance.choice([1, 2]),
        "moe_intermediate_size": chance.choice([24, 32]),
        "first_k_dense_replace": chance.choice([0, 0, 1, 2, 5]),
        "routed_scaling_factor": chance.choice([1.0, 2.5]),
        "norm_topk_prob": chance.choice([False, True]),
        "num_nextn_predict_layers": chance.choice([0, 1]),
    }


OPTIONS: dict[str, Callable[[dict[str, Any], random.Random], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2": _windows,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "olmoe": _olmoe,
    "glm4_moe": _glm4_moe,
}


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


def old_spelling(folder: Path, drop: Sequence[str] = ()) -> None:
    """Rewrites config.json as transformers 4 and earlier would: rope_theta and rope_scaling, torch_dtype.

    drop: keys that it did not write.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    if config["model_type"] == "phi3":  # which has it beside rope_scaling
        rope.pop("original_max_position_embeddings", None)
        kind = {"longrope": "su"}.get(kind, kind)
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = 4096  # and yet there is none
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in drop}))


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
