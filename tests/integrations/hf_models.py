"""Tiny random models of transformers, and how two implementations inside them are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pyllama.integrations.transformers import register

register()

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **COMMON,
    **EXPERTS,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "n_routed_experts": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=5),
    "qwen3": Qwen3Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=4),
    "olmoe": OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": Glm4MoeConfig(**COMMON, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1),
    "deepseek_v2": DeepseekV2Config(**LATENT, topk_method="greedy"),
    "deepseek_v3": DeepseekV3Config(**LATENT, n_group=2, topk_group=1),
}
DENSE = "llama", "mistral", "qwen3"
WINDOWED = "mistral", "qwen3"
REFERENCE = "sdpa"  # transformers' attention that computes in float64 throughout; "eager" has float32 in its softmax


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def use(model: PreTrainedModel, attention: str) -> None:
    """Chooses the attention, and with it the experts."""
    model.set_attn_implementation(attention)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("pyllama" if attention == "pyllama" else "eager")


def outcome(model: PreTrainedModel, attention: str, counted: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Logits [tokens, V] where `counted`, and every parameter's gradient of a function of them."""
    use(model, attention)
    model.zero_grad()
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    logits[counted].sin().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits[counted].detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Norms have float32 inside, which is why results in float64 are not closer; of zeros, some have roundings."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error, scale = (found[name] - tensor).abs().max().item(), tensor.abs().max().item()
        assert error <= max(tolerance * scale, 1e-15), f"{name}: {error} of {scale}"


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def padding(length: int, *rows: tuple[int, int]) -> Tensor:
    """A mask of padding; rows: where each one's tokens begin and end."""
    places = torch.arange(length)
    return torch.stack([(places >= begin) & (places < end) for begin, end in rows]).long()
