"""Configurations are read strictly: every key is understood, known to be irrelevant, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pyllama.architectures import FAMILIES, read_config
from pyllama.architectures.reader import IRRELEVANT, ConfigError
from pyllama.config import LinearScaling, Llama3Scaling, MLPConfig, ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
MIXTRAL = MISTRAL | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(config: dict[str, Any], ignore: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    return read_config(config | changes, ignore)[0]


def rope(config: ModelConfig) -> RopeConfig:
    found = config.layers[0].attention.rope
    assert found is not None
    return found


def test_families_are_found_by_themselves() -> None:
    assert set(FAMILIES) >= {
        "Glm4MoeForCausalLM",
        "LlamaForCausalLM",
        "LlamaMoeForCausalLM",
        "MinistralForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }


def test_defaults_are_transformers() -> None:
    """Old checkpoints leave out what had one value only when they were made."""
    from transformers import LlamaConfig, MistralConfig, MixtralConfig

    for ours, theirs in ((LLAMA, LlamaConfig), (MISTRAL, MistralConfig), (MIXTRAL, MixtralConfig)):
        ours = {key: value for key, value in ours.items() if key != "num_key_value_heads"}
        ours["num_attention_heads"], ours["hidden_size"] = 16, 256
        config = read(ours)
        expected = theirs(**{key: value for key, value in ours.items() if key not in ("architectures", "model_type")})
        attention = config.layers[0].attention
        assert attention.num_kv_heads == expected.num_key_value_heads
        assert attention.head_dim == 256 // 16
        assert attention.window == getattr(expected, "sliding_window", None)
        assert rope(config) == RopeConfig(expected.rope_parameters["rope_theta"], 16)
        assert config.norm_eps == expected.rms_norm_eps
        assert config.max_positions == expected.max_position_embeddings
        assert config.tie_embeddings == expected.tie_word_embeddings
        if ours is LLAMA:
            assert config.layers[0].ffn == MLPConfig(96, bias=expected.mlp_bias)
            assert attention.qkv_bias == attention.out_bias == expected.attention_bias


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5, 16)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5, 16)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeConfig(1e4, 16, scaling=LinearScaling(4))),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, RopeConfig(1e4, 16, scaling=LinearScaling(4))),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
            RopeConfig(1e4, 16, scaling=LinearScaling(4)),
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeConfig(5e5, 16, scaling=Llama3Scaling(8, 1, 4, 8192))),
        ({"rope_parameters": {"rope_theta": 5e5}}, RopeConfig(5e5, 16)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5, 16)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, RopeConfig(5e5, 16, scaling=Llama3Scaling(8, 1, 4, 8192))),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3}, RopeConfig(5e5, 16, scaling=Llama3Scaling(8, 1, 4, 8192))),
        ({"head_dim": 24}, RopeConfig(1e4, 24)),
        ({"head_dim": None}, RopeConfig(1e4, 16)),
    ],
)
def test_rope_in_both_spellings(given: dict[str, Any], expected: RopeConfig) -> None:
    assert rope(read(LLAMA, **given)) == expected


@pytest.mark.parametrize("key", sorted(IRRELEVANT - {"architectures"}))
def test_irrelevant_keys_change_nothing(key: str) -> None:
    assert read(LLAMA, **{key: "anything"}) == read(LLAMA)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"attention_sink": 4}, r"not known.*attention_sink = 4.*ignore_config_keys=\['attention_sink'\]"),
        (LLAMA, {"b": 1, "a": 2}, r"a = 2, b = 1.*ignore_config_keys=\['a', 'b'\]"),
        (LLAMA, {"hidden_act": "gelu"}, r"hidden_act = 'gelu': only 'silu', 'swish'"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window = 4096: only None"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = .*only fp8 with weight_block_size is"),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "x.MyLlama"}}, "auto_map = .*own code, which is not run"),
        (LLAMA, {"model_type": "gemma"}, "model_type = 'gemma': only 'llama'"),
        (LLAMA, {"rope_scaling": {"type": "ntk", "factor": 4}}, r"rope_scaling.type = 'ntk': only .*'llama3'"),
        (LLAMA, {"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type = 'proportional'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2}}, "rope_scaling.type"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"beta": 1}}, r"rope_scaling.beta = 1.*\['rope_scaling.beta'\]"),
        (LLAMA, {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, "rope_scaling.*rope_parameters is given too"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor = 4.0: high_freq_factor = 4.0"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        (LLAMA, {"hidden_size": 2**31}, "hidden_size must be 2147483647 at most, got 2147483648"),
        (LLAMA, {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be 65535 at most, got 2147483647"),
        (LLAMA, {"sinks": [7] * 99}, r"sinks = \[7, 7, [7, ]{60,80}\.\.\.\. If they"),
        (LLAMA, {"hidden_size": None}, "hidden_size must not be null"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        (LLAMA, {"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number, got -1.0"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        (LLAMA, {"num_attention_heads": 5, "num_key_value_heads": 2}, "num_attention_heads = 5 is not a multiple"),
        (LLAMA, {"num_attention_heads": 5}, "hidden_size = 64 is not a multiple"),
        (LLAMA, {"head_dim": 15}, "head size 15 is odd"),
        (MISTRAL, {"attention_bias": True}, "attention_bias = True"),
        (MISTRAL, {"layer_types": ["full_attention"]}, "layer_types must be a list of 2, each one of sliding_att"),
        (MISTRAL, {"layer_types": ["full_attention", "linear_attention"]}, "layer_types must be a list of 2"),
        (MIXTRAL, {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok = 3: there are only 2"),
    ],
)
def test_what_is_not_understood_is_refused(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(config, **changes)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_sizes_are_not_guessed(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        read({k: v for k, v in LLAMA.items() if k != key})


def test_ignored_keys_count_as_absent() -> None:
    assert read(LLAMA, ("attention_sink",), attention_sink=4) == read(LLAMA)
    assert read(LLAMA, ("hidden_act",), hidden_act="gelu") == read(LLAMA)
    assert read(LLAMA, ("rope_scaling",), rope_scaling={"type": "yarn"}) == read(LLAMA)
    linear = {"type": "linear", "factor": 2.0}
    assert read(LLAMA, ("rope_scaling.x",), rope_scaling=linear | {"x": 1}) == read(LLAMA, rope_scaling=linear)
    with pytest.raises(ConfigError, match="attention_sink"):
        read(LLAMA, ("rope_scaling.attention_sink",), attention_sink=4)
    with pytest.raises(TypeError, match=r"ignore_config_keys must be a collection of keys, as in \['hidden_act'\]"):
        read_config(LLAMA, "hidden_act")


@pytest.mark.parametrize(
    "names", [["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", ["LlamaForCausalLM", "X"], [["x"]]]
)
def test_unknown_architectures_are_named_beside_the_known(names: Any) -> None:
    with pytest.raises(ConfigError, match=r"architectures = .* is not known; known: .*LlamaForCausalLM, .*Mixtral"):
        read(LLAMA, architectures=names)


def test_vicunas_context_is_the_longer_one() -> None:
    config = read(LLAMA, max_position_embeddings=4096, max_sequence_length=16384)
    assert config.max_positions == 16384


@pytest.mark.parametrize(("window", "expected"), [(None, None), (7, 7)])
def test_mistrals_window_may_be_null(window: int | None, expected: int | None) -> None:
    assert read(MISTRAL, sliding_window=window).layers[0].attention.window == expected
    assert read(MIXTRAL, sliding_window=window).layers[0].attention.window == expected
