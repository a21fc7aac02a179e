"""Well-known models' shapes, as their config.json has them, for models of random weights."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

Values = dict[str, Any]


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> Values:
    return {
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


def _llama3(factor: float, original: int = 8192) -> Values:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": original}}


def _yarn(mscale: float) -> Values:
    scaling = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": mscale}
    more = {"mscale_all_dim": mscale, "original_max_position_embeddings": 4096}
    return {"rope_theta": 10000, "rope_scaling": scaling | more}


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rms_norm_eps": 1e-5}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "rms_norm_eps": 1e-5}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6} | {
    "rope_theta": 1e6,
    "head_dim": 128,
    "attention_bias": False,
}
QWEN3_MOE = (
    QWEN3
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
    | {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
)
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": 1e-5}
OLMOE = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
DEEPSEEK = LATENT | {"rms_norm_eps": 1e-6, "attention_bias": False, "moe_layer_freq": 1}
DEEPSEEK_V2 = DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
DEEPSEEK_V3 = DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
GLM4_MOE = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "rms_norm_eps": 1e-5, "rope_theta": 1e6}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# fmt: off
PHI_4_MINI_FACTORS = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on

SHAPES: dict[str, Values] = {
    "smollm2-135m": LLAMA | TIED | {"rope_theta": 100000.0} | _sizes(576, 1536, 30, 9, 3, 49152, 8192),
    "tinyllama-1.1b": LLAMA | UNTIED | {"rope_theta": 10000.0} | _sizes(2048, 5632, 22, 32, 4, 32000, 2048),
    "llama-2-7b": LLAMA | UNTIED | {"rope_theta": 10000.0} | _sizes(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.2-1b": LLAMA | TIED | _llama3(32.0) | _sizes(2048, 8192, 16, 32, 8, 128256, 131072),
    "llama-3.2-3b": LLAMA | TIED | _llama3(32.0) | _sizes(3072, 8192, 28, 24, 8, 128256, 131072),
    "llama-3.1-8b": LLAMA | UNTIED | _llama3(8.0) | _sizes(4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": LLAMA | UNTIED | _llama3(8.0) | _sizes(8192, 28672, 80, 64, 8, 128256, 131072),
    "llama-3.1-405b": LLAMA | UNTIED | _llama3(8.0) | _sizes(16384, 53248, 126, 128, 8, 128256, 131072),
    "mistral-7b": MISTRAL
    | UNTIED
    | {"rope_theta": 1e6, "sliding_window": None}
    | _sizes(4096, 14336, 32, 32, 8, 32768, 32768),
    "mixtral-8x7b": MIXTRAL
    | UNTIED
    | {"rope_theta": 1e6, "sliding_window": None, "router_aux_loss_coef": 0.02}
    | {"num_local_experts": 8, "num_experts_per_tok": 2}
    | _sizes(4096, 14336, 32, 32, 8, 32000, 32768),
    "qwen2.5-0.5b": QWEN2 | TIED | _sizes(896, 4864, 24, 14, 2, 151936, 32768),
    "qwen2.5-7b": QWEN2 | UNTIED | _sizes(3584, 18944, 28, 28, 4, 152064, 131072),
    "qwen3-0.6b": QWEN3 | TIED | _sizes(1024, 3072, 28, 16, 8, 151936, 40960),
    "qwen3-4b": QWEN3 | TIED | _sizes(2560, 9728, 36, 32, 8, 151936, 40960),
    "qwen3-8b": QWEN3 | UNTIED | _sizes(4096, 12288, 36, 32, 8, 151936, 40960),
    "qwen3-32b": QWEN3 | UNTIED | _sizes(5120, 25600, 64, 64, 8, 151936, 40960),
    "qwen3-30b-a3b": QWEN3_MOE | UNTIED | {"moe_intermediate_size": 768} | _sizes(2048, 6144, 48, 32, 4, 151936, 40960),
    "qwen3-235b-a22b": QWEN3_MOE
    | UNTIED
    | {"moe_intermediate_size": 1536, "rope_theta": 5e6}
    | _sizes(4096, 12288, 94, 64, 4, 151936, 262144),
    "olmoe-1b-7b": OLMOE
    | UNTIED
    | {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "router_aux_loss_coef": 0.01}
    | _sizes(2048, 1024, 16, 16, 16, 50304, 4096),
    "phi-4": PHI3
    | UNTIED
    | {"rope_theta": 250000.0, "original_max_position_embeddings": 16384}
    | _sizes(5120, 17920, 40, 40, 10, 100352, 16384),
    "phi-4-mini": PHI3
    | TIED
    | {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75}
    | {"sliding_window": 262144}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": PHI_4_MINI_FACTORS}}
    | _sizes(3072, 8192, 32, 24, 8, 200064, 131072),
    "deepseek-v2-lite": DEEPSEEK_V2
    | UNTIED
    | {"q_lora_rank": None, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}
    | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False}
    | {"scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001}
    | {"n_group": 1, "topk_group": 1}
    | _yarn(0.707)
    | _sizes(2048, 10944, 27, 16, 16, 102400, 163840),
    "deepseek-r1": DEEPSEEK_V3
    | UNTIED
    | {"q_lora_rank": 1536, "moe_intermediate_size": 2048, "first_k_dense_replace": 3}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True}
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5}
    | {"n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 1}
    | _yarn(1.0)
    | _sizes(7168, 18432, 61, 128, 128, 129280, 163840),
    "glm-4.5-air": GLM4_MOE
    | UNTIED
    | {"head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5, "use_qk_norm": False}
    | {"moe_intermediate_size": 1408, "first_k_dense_replace": 1, "norm_topk_prob": True}
    | {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "routed_scaling_factor": 1.0}
    | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1}
    | _sizes(4096, 10944, 46, 96, 8, 151552, 131072),
}


def find_shape(name: str) -> Values:
    """The config.json of a shape of the table; ValueError, with the known names and the closest first, for another."""
    if name in SHAPES:
        return SHAPES[name]
    close = get_close_matches(name.lower(), SHAPES, n=3, cutoff=0.3)
    known = ", ".join([*close, *(known for known in SHAPES if known not in close)])
    raise ValueError(f"there is no shape {name}, nor a folder of this name with a config.json; known shapes: {known}")


def first_layers(values: Values, layers: int) -> Values:
    """The config.json of the model's first layers alone; ValueError for more than it has."""
    count = values.get("num_hidden_layers", 0)
    if layers > count:
        raise ValueError(f"the model has {count} layers, so --layers may be 1 to {count}, got {layers}")
    cut = {"num_hidden_layers": layers, "num_nextn_predict_layers": 0}
    lists = {key: values[key][:layers] for key in ("layer_types",) if key in values}
    return values | {key: value for key, value in cut.items() if key in values} | lists
