"""What the families' configurations mean: transformers' defaults, publishers' own keys, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import AutoConfig

from pyllama.architectures import read_config
from pyllama.architectures.reader import ConfigError
from pyllama.config import GQAConfig, LongRopeScaling, MLPConfig, ModelConfig, MoEConfig, RopeConfig, YarnScaling
from pyllama.weights import BlockScales

BASE = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 4}


def family(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, "num_attention_heads": 16} | BASE | values


LLAMA = family("LlamaForCausalLM", "llama")
PHI3 = family("Phi3ForCausalLM", "phi3")
QWEN2 = family("Qwen2ForCausalLM", "qwen2", num_attention_heads=32)
QWEN3 = family("Qwen3ForCausalLM", "qwen3", num_attention_heads=32)
QWEN3_MOE = family("Qwen3MoeForCausalLM", "qwen3_moe", moe_intermediate_size=24)
QWEN2_MOE = family("Qwen2MoeForCausalLM", "qwen2_moe", moe_intermediate_size=24, shared_expert_intermediate_size=40)
OLMOE = family("OlmoeForCausalLM", "olmoe")
GLM = family("Glm4MoeForCausalLM", "glm4_moe", moe_intermediate_size=24)
NEW = [PHI3, QWEN2, QWEN3, QWEN3_MOE, QWEN2_MOE, OLMOE, GLM]
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def read(config: dict[str, Any], **changes: Any) -> ModelConfig:
    return read_config(config | changes)[0]


def attention(config: ModelConfig, layer: int = 0) -> GQAConfig:
    found = config.layers[layer].attention
    assert isinstance(found, GQAConfig)
    return found


def rope(config: ModelConfig) -> RopeConfig:
    found = attention(config).rope
    assert found is not None
    return found


def windows(config: ModelConfig) -> list[int | None]:
    return [attention(config, i).window for i in range(len(config.layers))]


def sparse(config: ModelConfig) -> list[bool]:
    return [isinstance(layer.ffn, MoEConfig) for layer in config.layers]


@pytest.mark.parametrize("config", NEW, ids=lambda config: config["model_type"])
def test_defaults_are_transformers(config: dict[str, Any]) -> None:
    found = read(config)
    theirs = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    ours = attention(found)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // theirs.num_attention_heads)
    assert ours.qkv_bias == (config is QWEN2 or getattr(theirs, "qkv_bias", getattr(theirs, "attention_bias", False)))
    assert ours.out_bias is False
    assert windows(found) == [None] * 4
    factor = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert rope(found) == RopeConfig(theirs.rope_parameters["rope_theta"], int(ours.head_dim * factor))
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.max_positions == theirs.max_position_embeddings
    assert found.tie_embeddings == theirs.tie_word_embeddings
    assert found.extra_layers == getattr(theirs, "num_mtp_layers", 0)
    ffn = found.layers[-1].ffn
    if isinstance(ffn, MoEConfig):
        assert ffn.num_experts == getattr(theirs, "num_experts", theirs.num_local_experts if config is GLM else None)
        assert ffn.top_k == theirs.num_experts_per_tok
        assert ffn.renormalize == theirs.norm_topk_prob
        assert ffn.scale == getattr(theirs, "routed_scaling_factor", 1.0)
        assert ffn.aux_loss_coef == getattr(theirs, "router_aux_loss_coef", 0.0)
        assert (ffn.num_groups, ffn.top_groups) == (getattr(theirs, "n_group", 1), getattr(theirs, "topk_group", 1))
        assert ffn.scoring == ("sigmoid" if config is GLM else "softmax")
        assert sparse(found) == [config is not GLM or i >= theirs.first_k_dense_replace for i in range(4)]
    else:
        assert ffn == MLPConfig(96)


def test_what_distinguishes_the_families() -> None:
    norms = [attention(read(config)).qk_norm for config in (QWEN2, QWEN3, QWEN3_MOE, OLMOE, GLM)]
    assert norms == [None, "head", "head", "whole", None]
    assert attention(read(GLM, use_qk_norm=True)).qk_norm == "head"
    assert attention(read(OLMOE, clip_qkv=8.0)).clip == 8.0
    biased = [attention(read(config, attention_bias=True)) for config in (QWEN3, QWEN3_MOE, OLMOE, GLM)]
    assert [(found.qkv_bias, found.out_bias) for found in biased] == [(True, True)] * 3 + [(True, False)]
    shared = read(QWEN2_MOE).layers[0].ffn, read(GLM, n_shared_experts=2).layers[1].ffn
    assert [(ffn.shared, ffn.shared_gate) for ffn in shared] == [(MLPConfig(40), True), (MLPConfig(48), False)]
    assert read(QWEN3_MOE, num_experts=6, num_experts_per_tok=2).layers[0].ffn.num_experts == 6
    assert read(QWEN3_MOE, num_local_experts=6, num_experts_per_tok=2).layers[0].ffn.num_experts == 6


ON = {"use_sliding_window": True, "sliding_window": 7}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (QWEN2, {"sliding_window": 7, "max_window_layers": 0}, [None] * 4),  # it is off
        (QWEN2, ON, [None] * 4),  # max_window_layers is 28
        (QWEN2, ON | {"max_window_layers": 3}, [None, None, None, 7]),
        (QWEN3, ON | {"max_window_layers": 0}, [7] * 4),
        (QWEN3, ON | {"max_window_layers": 0, "sliding_window": None}, [None] * 4),
        (QWEN2, ON | {"layer_types": TYPES}, [None, 7, 7, None]),
        (QWEN2, {"layer_types": ["full_attention"] * 4}, [None] * 4),
        (QWEN2_MOE, {"sliding_window": 0}, [None] * 4),  # as transformers writes it
        (QWEN2_MOE, ON, [7, None, 7, None]),
        (QWEN2_MOE, ON | {"max_window_layers": 2}, [7, None, None, None]),
        (QWEN2_MOE, ON | {"layer_types": TYPES}, [None, 7, 7, None]),
        (QWEN3_MOE, {"sliding_window": 7, "max_window_layers": 2}, [None] * 4),
        (QWEN3_MOE, ON, [7] * 4),
        (PHI3, {"sliding_window": 7}, [7] * 4),
    ],
)
def test_sliding_windows(config: dict[str, Any], changes: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(read(config, **changes)) == expected


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (QWEN3_MOE, {"decoder_sparse_step": 2}, [False, True, False, True]),
        (QWEN2_MOE, {"mlp_only_layers": [0, 2]}, [False, True, False, True]),
        (QWEN2_MOE, {"mlp_only_layers": [3], "decoder_sparse_step": 2}, [False, True, False, False]),
        (QWEN3_MOE, {"decoder_sparse_step": 5}, [False] * 4),
        (GLM, {"first_k_dense_replace": 0}, [True] * 4),
        (GLM, {"first_k_dense_replace": 3}, [False, False, False, True]),
        (GLM, {"first_k_dense_replace": 9}, [False] * 4),
    ],
)
def test_layers_with_experts(config: dict[str, Any], changes: dict[str, Any], expected: list[bool]) -> None:
    assert sparse(read(config, **changes)) == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_yarn_is_read_as_the_qwens_cards_write_it() -> None:
    """They leave max_position_embeddings as it was: the context is what YaRN reaches."""
    for config in (QWEN2, QWEN3, LLAMA):
        found = read(config, rope_scaling=YARN, max_position_embeddings=32768)
        assert rope(found).scaling == YarnScaling(4.0, 32768)
        assert rope(found).magnitude == pytest.approx(0.1 * math.log(4) + 1)
        assert found.max_positions == 131072
        assert read(config, rope_scaling=YARN, max_position_embeddings=262144).max_positions == 262144
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(QWEN3, rope_scaling=old) == read(QWEN3, rope_scaling=YARN)


@pytest.mark.parametrize(
    ("changes", "scaling", "magnitude"),
    [
        ({"attention_factor": 1.5}, YarnScaling(4.0, 32768), 1.5),
        ({"beta_fast": 16, "beta_slow": 2, "truncate": False}, YarnScaling(4.0, 32768, 16, 2, False), None),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, YarnScaling(4.0, 32768), 1.0),
        ({"mscale": 1.0}, YarnScaling(4.0, 32768), None),
        ({"factor": None}, YarnScaling(2.0, 32768), 0.1 * math.log(2) + 1),  # of the whole and the original context
        ({"factor": 1.0}, YarnScaling(1.0, 32768), 1.0),
    ],
)
def test_yarn_in_all_its_keys(changes: dict[str, Any], scaling: YarnScaling, magnitude: float | None) -> None:
    found = rope(read(QWEN3, rope_scaling=YARN | changes, max_position_embeddings=65536))
    assert found.scaling == scaling
    assert found.magnitude == pytest.approx(magnitude or 0.1 * math.log(4) + 1)


def test_longrope_has_three_names_and_two_places_for_its_context() -> None:
    expected = LongRopeScaling((1.0,) * 8, (2.0,) * 8, 4096)
    beside = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    for name in ("longrope", "su", "yarn"):
        found = rope(read(PHI3, rope_scaling=LONG | {"type": name}, **beside))
        assert found == RopeConfig(
            10_000.0, 16, scaling=expected, magnitude=math.sqrt(1 + math.log(32) / math.log(4096))
        )
        # transformers 5 writes the name it was and the name it is
        both = LONG | {"type": name, "rope_type": "longrope", "original_max_position_embeddings": 4096}
        assert rope(read(PHI3, rope_parameters=both | {"rope_theta": 10_000.0}, **beside)) == found
    without = read(PHI3, rope_scaling=LONG, max_position_embeddings=131072)  # 4096 is Phi-3's default
    assert rope(without).scaling == expected
    other = read(PHI3, rope_scaling=LONG, max_position_embeddings=131072, original_max_position_embeddings=8192)
    assert rope(other).scaling == LongRopeScaling((1.0,) * 8, (2.0,) * 8, 8192)
    assert other.rope_switch == 8192
    assert rope(read(PHI3, rope_scaling=LONG | {"attention_factor": 1.25}, **beside)).magnitude == 1.25
    assert rope(read(PHI3, rope_scaling=None, **beside)).scaling is None


def test_partial_rotation_is_read_in_both_places() -> None:
    assert rope(read(PHI3, partial_rotary_factor=0.75)).dim == 12
    assert rope(read(PHI3, rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 0.5})).dim == 8
    assert rope(read(GLM)).dim == 8
    assert rope(read(GLM, head_dim=128, partial_rotary_factor=1.0)).dim == 128


def test_what_publishers_write_and_transformers_does_not_know() -> None:
    phi4 = dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False)
    phi4 |= {"full_attn_mod": 1, "interpolate_factor": 1, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    assert read(PHI3, **phi4) == read(PHI3)
    assert read(QWEN2, use_mrope=False) == read(QWEN2)
    coder = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "max_window_layers": 48}
    assert read(QWEN3_MOE, **coder) == read(QWEN3_MOE)


def test_code_that_comes_with_a_known_class_is_not_needed() -> None:
    for brought in ("modeling_phi3.Phi3ForCausalLM", "microsoft/Phi-3--modeling_phi3.Phi3ForCausalLM"):
        auto_map = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": brought}
        assert read(PHI3, auto_map=auto_map) == read(PHI3)
    assert read(PHI3, auto_map={"AutoTokenizer": "tokenizer.Own"}) == read(PHI3)  # there is no code for the model
    assert read(PHI3, auto_map=None) == read(PHI3)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling.OtherForCausalLM"}}, "auto_map = .*own code.*not run"),
        (PHI3, {"auto_map": "modeling.OtherForCausalLM"}, "auto_map = .*own code.*not run"),
        (PHI3, {"attention_bias": True}, "attention_bias = True: only False"),
        (PHI3, {"lm_head_bias": True}, "lm_head_bias = True: only False"),
        (PHI3, {"full_attn_mod": 2}, "full_attn_mod = 2: only 1"),
        (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5: .*24 of 16"),
        (PHI3, {"partial_rotary_factor": 1e308}, "partial_rotary_factor = 1e[+]308: .*2147483647 of 16"),
        (PHI3, {"rope_theta": 10**400}, "rope_theta must be a positive number"),
        (PHI3, {"partial_rotary_factor": 0.2}, "partial_rotary_factor = 0.2: .*3 of 16"),
        (PHI3, {"rope_scaling": LONG | {"short_factor": [1.0]}}, "short_factor must be a list of 8 positive numbers"),
        (PHI3, {"rope_scaling": {"type": "longrope"}}, "lacks rope_scaling.short_factor"),
        (PHI3, {"rope_scaling": {"type": "su"}}, "lacks rope_scaling.short_factor"),
        (PHI3, {"rope_scaling": LONG | {"type": "linear", "factor": 2.0}}, "short_factor = "),
        (PHI3, {"rope_scaling": LONG | {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.type = 'longrope'"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True: only False"),
        (QWEN2, {"attention_bias": True}, "attention_bias = True"),
        (QWEN2, {"layer_types": TYPES}, "layer_types = .*use_sliding_window is not true"),
        (QWEN2, ON | {"layer_types": TYPES[:3]}, "layer_types must be a list of 4"),
        (QWEN2, {"max_window_layers": -1}, "max_window_layers must be a positive integer or 0, got -1"),
        (QWEN2, {"rope_scaling": YARN | {"short_factor": [1.0]}}, "short_factor must be a list of 4"),
        (QWEN3, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type = 'dynamic': only .*'yarn'"),
        (QWEN3, {"rope_scaling": YARN | {"mscale": "1"}}, "rope_scaling.mscale must be a positive number or 0"),
        (QWEN3, {"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate must be true or false"),
        (QWEN3, {"rope_scaling": YARN | {"gamma": 1}}, r"rope_scaling.gamma = 1.*\['rope_scaling.gamma'\]"),
        (QWEN3_MOE, {"layer_types": TYPES}, "layer_types"),
        (QWEN3_MOE, ON | {"max_window_layers": 2}, "max_window_layers = 2: only 0"),
        (QWEN3_MOE, {"use_qk_norm": False}, "use_qk_norm = False: only True"),
        (QWEN3_MOE, {"qkv_bias": True}, "qkv_bias = True: only False"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8: only 0"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        (QWEN3_MOE, {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok = 5: there are only 4"),
        (QWEN3_MOE, {"num_experts": 4, "num_local_experts": 8}, "num_experts = 4"),
        (QWEN3_MOE, {"mlp_only_layers": [-1]}, "mlp_only_layers must be a list of integers, 0 at least"),
        (QWEN2_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer, got 0"),
        (QWEN2_MOE, {"norm_topk_prob": None}, "norm_topk_prob must not be null"),
        (OLMOE, {"clip_qkv": -1.0}, "clip_qkv must be a positive number"),
        (OLMOE, {"sliding_window": 7}, "sliding_window = 7"),
        (OLMOE, {"num_experts_per_tok": 65}, "num_experts_per_tok = 65: there are only 64"),
        (GLM, {"n_group": 3}, "n_group = 3: n_routed_experts = 128 is not a multiple"),
        (GLM, {"n_group": 2, "topk_group": 4}, "topk_group = 4: there are only n_group = 2"),
        (GLM, {"n_group": 32, "topk_group": 1}, "num_experts_per_tok = .*1 groups have only 4 experts"),
        (GLM, {"first_k_dense_replace": -1}, "first_k_dense_replace must be a positive integer or 0"),
        (GLM, {"n_shared_experts": 0}, "n_shared_experts must be a positive integer"),
        (GLM, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (GLM, {"num_nextn_predict_layers": 2**31 - 1}, "num_nextn_predict_layers must be 64 at most"),
        (QWEN3, {"rope_theta": 1, "rope_scaling": YARN}, "rope_theta = 1: all dimensions would turn alike"),
        (
            PHI3,
            {"original_max_position_embeddings": 1, "rope_scaling": LONG},
            "original_max_position_embeddings = 1: no context",
        ),
    ],
)
def test_what_is_not_understood_is_refused(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config, **changes)


@pytest.mark.parametrize("depth", [100, 900, 970])
def test_values_nested_deeply_are_refused_like_others(depth: int) -> None:
    """Within what JSON's reader takes, which is near the interpreter's own limit."""
    nested: Any = 1
    for _ in range(depth):
        nested = {"a": nested}
    with pytest.raises(ConfigError, match="not known and may change what the model computes: x = "):
        read(QWEN3, x=nested)
    assert read_config(QWEN3 | {"x": nested}, ["x"])[0] == read(QWEN3)


def test_the_longest_context_is_what_ops_count_to() -> None:
    assert read(QWEN3, rope_scaling=YARN | {"factor": 1e308}).max_positions == 2**31 - 1


def test_many_dense_layers_are_looked_up_fast() -> None:
    """In a list, each layer would be sought among a million."""
    config = read(QWEN3_MOE, num_hidden_layers=60_000, mlp_only_layers=list(range(100_000, 1_100_000)))
    assert all(sparse(config))


@pytest.mark.parametrize("config", NEW, ids=lambda config: config["model_type"])
def test_another_model_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model_type = 'gemma': only '{config['model_type']}'"):
        read(config, model_type="gemma")


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 64], "fmt": "e4m3", "activation_scheme": "dynamic"}


def test_block_scales_are_read() -> None:
    for config in (QWEN3, GLM):
        assert read_config(config | {"quantization_config": FP8})[1].scales == BlockScales(128, 64)
        assert read_config(config | {"quantization_config": FP8 | {"modules_to_not_convert": []}})[0] == read(config)
        assert read_config(config)[1].scales is None
        assert read_config(config | {"quantization_config": None})[1].scales is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config = .*only fp8 with weight_block_size is read"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config = .*only fp8"),
        ({"fmt": "e5m2"}, "quantization_config.fmt = 'e5m2': only 'e4m3'"),
        (
            {"weight_block_size": [128]},
            "quantization_config.weight_block_size must be a list of 2 integers, 1 at least",
        ),
        ({"weight_block_size": [128, 0]}, "quantization_config.weight_block_size must be a list of 2 integers"),
        ({"bits": 4}, r"quantization_config.bits = 4.*\['quantization_config.bits'\]"),
    ],
)
def test_other_quantized_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(QWEN3, quantization_config=FP8 | changes)
    whole = {key: value for key, value in FP8.items() if key != "weight_block_size"}  # one scale for each tensor
    with pytest.raises(ConfigError, match="only fp8 with weight_block_size is read"):
        read(QWEN3, quantization_config=whole)
