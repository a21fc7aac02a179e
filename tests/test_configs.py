"""Every real configuration in tests/configs is read, and describes the model that its publisher describes."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from config_facts import FACTS, MLA, MoE

from pyllama.architectures import read_config
from pyllama.architectures.reader import ConfigError
from pyllama.config import (
    GQAConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnScaling,
)
from pyllama.loader import _eos_token_ids
from pyllama.model import Model
from pyllama.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "configs"
# Meta's own checkpoints have params.json in the place of config.json.
CONFIGS = sorted(path.parent.name for kind in ("config", "params") for path in FOLDER.glob(f"*/{kind}.json"))
TOKENIZER_CONFIGS = sorted(path.parent.name for path in FOLDER.glob("*/tokenizer_config.json"))


# What must be refused, by the key: one of its publisher's own or misspelt, which nobody else can know to be
# harmless; weights that are not read; and a name that says that somebody changed the model.
REFUSED = {
    "ALLaM-7B-Instruct-preview": "internal_version",
    "ELYZA-japanese-Llama-2-13b-instruct": "use_cash",
    "Mistral-7B-Instruct-v0.2-GPTQ": "quantization_config",
    "Pygmalion-7b-Merged-Safetensors": "badwordsids",
}
# Every bos_token and eos_token of the folders.
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|endoftext|>"]
SPECIAL += ["<|begin_of_text|>", "<|eot_id|>"]


def content(name: str) -> dict[str, Any]:
    file = FOLDER / name / "config.json"
    file = file if file.is_file() else FOLDER / name / "params.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["vocab_size"] == -1:  # Llama 2 leaves it to its tokenizer, of which the loader knows by the embedding
        values["vocab_size"] = 32000
    return values


def read(name: str, **changes: Any) -> ModelConfig:
    ignored = [REFUSED[name]] if name in REFUSED else []
    return read_config(content(name) | changes, ignore_config_keys=ignored)[0]


def test_every_file_has_its_facts() -> None:
    assert set(CONFIGS) == set(FACTS)
    assert len(CONFIGS) >= 20
    assert len(TOKENIZER_CONFIGS) >= 20


@pytest.mark.parametrize("name", CONFIGS)
def test_config_describes_the_published_model(name: str) -> None:
    config, facts = read(name), FACTS[name]
    first = config.layers[0]
    dense = len(config.layers) if facts.moe is None else facts.moe.dense
    found = facts._replace(
        layers=len(config.layers),
        hidden=config.hidden_size,
        heads=first.attention.num_heads,
        kv_heads=getattr(first.attention, "num_kv_heads", first.attention.num_heads),
        ffn=first.ffn.size,
        vocab=config.vocab_size,
        context=config.max_positions,
        extra_layers=config.extra_layers,
    )
    assert found == facts
    assert len({layer.attention for layer in config.layers}) == 1
    assert {layer.ffn for layer in config.layers[:dense]} <= {MLPConfig(facts.ffn)}
    assert (facts.mla is None) == isinstance(first.attention, GQAConfig)


@pytest.mark.parametrize("name", [name for name in CONFIGS if FACTS[name].moe])
def test_experts(name: str) -> None:
    config, facts = read(name), FACTS[name].moe
    assert facts is not None
    (ffn,) = {layer.ffn for layer in config.layers[facts.dense :]}
    assert isinstance(ffn, MoEConfig)
    assert ffn.correction_bias == (facts.scoring == "sigmoid")
    found = MoE(
        experts=ffn.num_experts,
        top_k=ffn.top_k,
        size=ffn.size,
        active=facts.active,
        dense=facts.dense,
        shared=None if ffn.shared is None else ffn.shared.size,
        renormalize=ffn.renormalize,
        scale=ffn.scale,
        scoring=ffn.scoring,
        # Of one group it does not matter how it is chosen.
        groups=(ffn.num_groups, ffn.top_groups, ffn.group_top_k) if ffn.num_groups > 1 else (1, 1, 1),
        shared_gate=ffn.shared_gate,
    )
    assert found == facts
    idle = (len(config.layers) - facts.dense) * (ffn.num_experts - ffn.top_k) * 3 * config.hidden_size * ffn.size
    most = (FACTS[name].parameters - idle) / 1e9
    least = most - 2 * config.vocab_size * config.hidden_size / 1e9  # some cards leave out the embedding, or the head
    rounding = 0.5 * 10.0 ** -len(str(facts.active).partition(".")[2])
    assert least - rounding <= facts.active <= most + rounding


@pytest.mark.parametrize("name", [name for name in CONFIGS if FACTS[name].mla])
def test_latent_attention(name: str) -> None:
    attention, facts = read(name).layers[0].attention, FACTS[name].mla
    assert isinstance(attention, MLAConfig)
    assert facts is not None
    assert (attention.kv_rank, attention.nope_dim, attention.rope.dim, attention.v_dim) == (512, 128, 64, 128)
    assert attention.norm_eps == 1e-6
    assert MLA(attention.q_rank, pytest.approx(attention.scale, rel=1e-12)) == facts


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = Model(read(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == FACTS[name].parameters


@pytest.mark.parametrize(
    ("name", "qkv_bias", "qk_norm"),
    [
        ("phi-4", False, None),
        ("Phi-4-mini-instruct", False, None),
        ("Qwen2.5-7B", True, None),
        ("Qwen2-57B-A14B", True, None),
        ("Qwen3-8B", False, "head"),
        ("Qwen3-30B-A3B", False, "head"),
        ("OLMoE-1B-7B-0125-Instruct", False, "whole"),
        ("GLM-4.5-Air", True, None),
    ],
)
def test_biases_and_norms_of_queries(name: str, qkv_bias: bool, qk_norm: str | None) -> None:
    attention = read(name).layers[-1].attention
    assert isinstance(attention, GQAConfig)
    assert (attention.qkv_bias, attention.out_bias, attention.qk_norm) == (qkv_bias, False, qk_norm)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("DeepSeek-R1", "weight_scale_inv"),
        ("Kimi-K2-Instruct", "weight_scale_inv"),
        ("DeepSeek-V3-671B-original", "scale"),
        ("DeepSeek-V3.1-original", "scale"),
        ("DeepSeek-V2.5", None),
    ],
)
def test_scales_of_blocks(name: str, tensor: str | None) -> None:
    scales = read_config(content(name))[1].scales
    assert (scales is None) == (tensor is None)
    if scales is not None:
        assert (scales.rows, scales.columns, scales.name) == (128, 128, tensor)


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_change_the_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{REFUSED[name]} = .*ignore_config_keys=\['{REFUSED[name]}'\]"):
        read_config(content(name))


@pytest.mark.parametrize(
    ("name", "theta", "scaling"),
    [
        ("llama-7b", 10_000, None),
        ("Meta-Llama-3-8B-Instruct", 500_000, None),
        ("Llama-3.1-8B", 500_000, Llama3Scaling(8, 1, 4, 8192)),
        ("Llama-3.2-1B-Instruct", 500_000, Llama3Scaling(32, 1, 4, 8192)),
        ("deepseek-coder-1.3b-instruct", 100_000, LinearScaling(4)),
        ("CodeLlama-7b-Instruct-hf", 1_000_000, None),
        ("Yi-6B-Chat", 5_000_000, None),
        ("SmolLM2-135M", 100_000, None),
        ("Mixtral-8x7B-v0.1", 1_000_000, None),
        ("phi-4", 250_000, None),
        ("Qwen2.5-0.5B", 1_000_000, None),
        ("Qwen3-235B-A22B-Instruct-2507", 5_000_000, None),
        ("MiniMind-LMConfig", 10_000, None),
        ("Llama-2-7b-original", 10_000, None),
        ("Llama-3.1-8B-original", 500_000, Llama3Scaling(8, 1, 4, 8192)),
        ("Llama-3.2-1B-original", 500_000, Llama3Scaling(32, 1, 4, 8192)),
    ],
)
def test_rope(name: str, theta: float, scaling: object) -> None:
    rope = read(name).layers[0].attention.rope
    assert rope is not None
    assert (rope.theta, rope.scaling, rope.interleaved) == (theta, scaling, False)
    assert rope.dim == read(name).layers[0].attention.head_dim


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("GLM-4.5-Air", RopeConfig(1_000_000, 64)),  # half of each head
        # The two corrections of YaRN cancel out in cosines and sines, and stay in the scale of the scores.
        ("DeepSeek-V2-Lite-Chat", RopeConfig(10_000, 64, True, YarnScaling(40, 4096))),
        ("DeepSeek-R1", RopeConfig(10_000, 64, True, YarnScaling(40, 4096))),
        ("DeepSeek-V3.1-original", RopeConfig(10_000, 64, True, YarnScaling(40, 4096))),
        ("DeepSeek-16B-original", RopeConfig(10_000, 64, True)),  # made for no more than the original context
        ("Kimi-K2-Instruct", RopeConfig(50_000, 64, True, YarnScaling(32, 4096, 1, 1))),
        ("Moonlight-16B-A3B-Instruct", RopeConfig(50_000, 64, True)),
    ],
)
def test_partial_and_interleaved_rope(name: str, rope: RopeConfig) -> None:
    assert read(name).layers[0].attention.rope == rope


@pytest.mark.parametrize(
    ("name", "short", "long"),
    [
        ("Phi-3.5-mini-instruct", (1.0, 2.8399994373321533), (1.0800000429153442, 64.83999633789062)),
        ("Phi-4-mini-instruct", (1.0, 1.0), (1, 47.77)),
    ],
)
def test_longrope(name: str, short: tuple[float, float], long: tuple[float, float]) -> None:
    """Phi-4-mini rotates three quarters of a head."""
    config = read(name)
    rope = config.layers[0].attention.rope
    assert rope is not None
    assert isinstance(rope.scaling, LongRopeScaling)
    assert (rope.theta, rope.dim, rope.interleaved, config.rope_switch) == (10_000, 96, False, 4096)
    assert rope.magnitude == pytest.approx((17 / 12) ** 0.5)  # 1 + log(32) / log(4096): 32 times 4096 tokens
    for factors, ends in ((rope.scaling.short_factors, short), (rope.scaling.long_factors, long)):
        assert len(factors) == 48
        assert (factors[0], factors[-1]) == ends


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-8B"])
def test_yarn_as_model_cards_switch_it_on(name: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = read(name, rope_scaling=scaling)
    rope = config.layers[0].attention.rope
    assert rope is not None
    assert (rope.scaling, config.max_positions) == (YarnScaling(4, 32768), 131072)
    assert rope.magnitude == pytest.approx(0.1 * log(4) + 1)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("phi-4", None),
        ("Qwen2.5-7B", None),
        ("Qwen3-32B", None),
        ("Qwen2-57B-A14B", None),
        ("Mistral-7B-v0.1", 4096),
        ("zephyr-7b-beta", 4096),
        ("Mistral-7B-Instruct-v0.3", None),
    ],
)
def test_sliding_window(name: str, window: int | None) -> None:
    assert {layer.attention.window for layer in read(name).layers} == {window}


def test_sliding_window_of_some_layers() -> None:
    layers = read("Qwen2.5-0.5B", use_sliding_window=True, max_window_layers=21).layers
    assert [layer.attention.window for layer in layers] == [None] * 21 + [32768] * 3


def test_head_size_is_read_where_it_is_not_the_quotient() -> None:
    attention = read("Mistral-Nemo-Base-2407").layers[0].attention
    assert isinstance(attention, GQAConfig)
    assert (attention.head_dim, attention.num_heads) == (128, 32)  # 5120 / 32 is 160


def test_mixtral_routes_to_two_of_eight() -> None:
    ffn = read("Mixtral-8x7B-v0.1").layers[0].ffn
    assert ffn == MoEConfig(8, 2, 14336, aux_loss_coef=0.02)


TIED = {"Llama-3.2-1B-Instruct", "Llama-3.2-1B-original", "Llama-3.2-3B-Instruct", "MiniMind-LMConfig", "MiniMind2"}
TIED |= {"Phi-4-mini-instruct", "Qwen2.5-0.5B", "Qwen3-4B", "SmolLM2-135M"}


@pytest.mark.parametrize("name", CONFIGS)
def test_tied_embeddings(name: str) -> None:
    assert read(name).tie_embeddings == (name in TIED)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "architectures" in content(name)])
def test_end_of_text_ids_are_read(name: str) -> None:
    ids = _eos_token_ids(FOLDER / name, None)
    assert ids
    assert max(ids) < FACTS[name].vocab


def test_end_of_text_ids_of_both_configurations_count() -> None:
    assert _eos_token_ids(FOLDER / "llama-3-Korean-Bllossom-8B", None) == {128001, 128009}


def read_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Beside a tokenizer.json that knows the special tokens; the rest of the vocabulary is no matter here."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    for file in (FOLDER / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("name", TOKENIZER_CONFIGS)
def test_tokenizer_config_is_read(name: str, tmp_path: Path) -> None:
    values = json.loads((FOLDER / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    wanted = {key: values[key] for key in ("bos_token", "eos_token")}
    wanted = {key: token if isinstance(token, str) else token["content"] for key, token in wanted.items()}
    tokenizer = read_tokenizer(name, tmp_path)
    assert tokenizer.bos_token_id == SPECIAL.index(wanted["bos_token"])
    assert tokenizer.eos_token_id == SPECIAL.index(wanted["eos_token"])
    assert tokenizer.encode("Tyre")[:-1] == [tokenizer.bos_token_id] * values.get("add_bos_token", False)
    has_template = "chat_template" in values or (tmp_path / "chat_template.jinja").exists()
    assert (tokenizer.chat_template is not None) == has_template
    if has_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Where is Tyre?"}])
        assert "Where is Tyre?" in chat


SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"


@pytest.mark.parametrize(
    ("name", "system"), [("llama-3-Korean-Bllossom-8B", ""), ("Llama-3.3-70B-Instruct", f"{SYSTEM}\n\n<|eot_id|>")]
)
def test_llama_3_chat_is_written_as_its_model_card_says(name: str, system: str, tmp_path: Path) -> None:
    chat = read_tokenizer(name, tmp_path).apply_chat_template([{"role": "user", "content": " Where is Tyre?\n"}])
    user = "<|start_header_id|>user<|end_header_id|>\n\nWhere is Tyre?<|eot_id|>"
    assert chat == f"<|begin_of_text|>{system}{user}<|start_header_id|>assistant<|end_header_id|>\n\n"
