"""Every real configuration in tests/configs is read, and describes the model that its publisher describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch

from pyllama.architectures import read_config
from pyllama.architectures.reader import ConfigError
from pyllama.config import LinearScaling, Llama3Scaling, ModelConfig, MoEConfig
from pyllama.loader import _eos_token_ids
from pyllama.model import Model
from pyllama.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "configs"
CONFIGS = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
TOKENIZER_CONFIGS = sorted(path.parent.name for path in FOLDER.glob("*/tokenizer_config.json"))


class Facts(NamedTuple):
    """What model cards and papers say."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    parameters: int


FACTS = {
    "ALLaM-7B-Instruct-preview": Facts(32, 4096, 32, 32, 11008, 64000, 4096, 7_000_559_616),
    "Atom-7B": Facts(32, 4096, 32, 32, 11008, 65000, 4096, 7_008_751_616),
    "CodeLlama-7b-Instruct-hf": Facts(32, 4096, 32, 32, 11008, 32016, 16384, 6_738_546_688),
    "DeepSeek-R1-Distill-Llama-8B": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
    "ELYZA-japanese-Llama-2-13b-instruct": Facts(40, 5120, 40, 40, 13824, 32000, 4096, 13_015_864_320),
    "Llama-2-13b-hf": Facts(40, 5120, 40, 40, 13824, 32000, 4096, 13_015_864_320),
    "Llama-2-70b-chat-hf": Facts(80, 8192, 64, 8, 28672, 32000, 4096, 68_976_648_192),
    "Llama-2-7b-hf": Facts(32, 4096, 32, 32, 11008, 32000, 4096, 6_738_415_616),
    "Llama-3.1-405B": Facts(126, 16384, 128, 8, 53248, 128256, 131072, 405_853_388_800),
    "Llama-3.1-70B": Facts(80, 8192, 64, 8, 28672, 128256, 131072, 70_553_706_496),
    "Llama-3.1-8B": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
    "Llama-3.2-1B-Instruct": Facts(16, 2048, 32, 8, 8192, 128256, 131072, 1_235_814_400),
    "Llama-3.2-3B-Instruct": Facts(28, 3072, 24, 8, 8192, 128256, 131072, 3_212_749_824),
    "Llama-3.3-70B-Instruct": Facts(80, 8192, 64, 8, 28672, 128256, 131072, 70_553_706_496),
    "Meta-Llama-3-8B-Instruct": Facts(32, 4096, 32, 8, 14336, 128256, 8192, 8_030_261_248),
    "Mistral-7B-Instruct-v0.2-GPTQ": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
    "Mistral-7B-Instruct-v0.3": Facts(32, 4096, 32, 8, 14336, 32768, 32768, 7_248_023_552),
    "Mistral-7B-v0.1": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
    "Mistral-Nemo-Base-2407": Facts(40, 5120, 32, 8, 14336, 131072, 128000, 12_247_782_400),
    "Mixtral-8x22B-v0.1": Facts(56, 6144, 48, 8, 16384, 32000, 65536, 140_620_634_112),
    "Mixtral-8x7B-v0.1": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 46_702_792_704),
    "OpenMath-CodeLlama-13b-Python-hf": Facts(40, 5120, 40, 40, 13824, 32000, 16384, 13_015_864_320),
    "Pygmalion-7b-Merged-Safetensors": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "SmolLM2-135M": Facts(30, 576, 9, 3, 1536, 49152, 8192, 134_515_008),
    "TinyLlama-1.1B-Chat-v1.0": Facts(22, 2048, 32, 4, 5632, 32000, 2048, 1_100_048_384),
    "Yi-6B-Chat": Facts(32, 4096, 32, 4, 11008, 64000, 4096, 6_061_035_520),
    "deepseek-coder-1.3b-instruct": Facts(24, 2048, 16, 16, 5504, 32256, 16384, 1_346_471_936),
    "dolphin-2.5-mixtral-8x7b": Facts(32, 4096, 32, 8, 14336, 32002, 32768, 46_702_809_088),
    "llama-3-Korean-Bllossom-8B": Facts(32, 4096, 32, 8, 14336, 128256, 8192, 8_030_261_248),
    "llama-7b": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "openllama-chinese-english-3b": Facts(26, 3200, 32, 32, 8640, 32001, 2048, 3_426_480_000),
    "stable-vicuna-13B-HF": Facts(40, 5120, 40, 40, 13824, 32001, 2048, 13_015_874_560),
    "vicuna-13b-v1.3": Facts(40, 5120, 40, 40, 13824, 32000, 2048, 13_015_864_320),
    "vicuna-7b-v1.3": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "zephyr-7b-beta": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
}
# What must be refused, by the key: one of its publisher's own or misspelt, which nobody else can know to be
# harmless; and weights that are not read.
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
    return json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))


def read(name: str) -> ModelConfig:
    return read_config(content(name), ignore_config_keys=[REFUSED[name]] if name in REFUSED else [])[0]


def test_every_file_has_its_facts() -> None:
    assert set(CONFIGS) == set(FACTS)
    assert len(CONFIGS) >= 20
    assert len(TOKENIZER_CONFIGS) >= 20


@pytest.mark.parametrize("name", CONFIGS)
def test_config_describes_the_published_model(name: str) -> None:
    config = read(name)
    layer = config.layers[0]
    assert set(config.layers) == {layer}
    found = Facts(
        layers=len(config.layers),
        hidden=config.hidden_size,
        heads=layer.attention.num_heads,
        kv_heads=layer.attention.num_kv_heads,
        ffn=layer.ffn.size,
        vocab=config.vocab_size,
        context=config.max_positions,
        parameters=FACTS[name].parameters,
    )
    assert found == FACTS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = Model(read(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == FACTS[name].parameters


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
    ],
)
def test_rope(name: str, theta: float, scaling: object) -> None:
    rope = read(name).layers[0].attention.rope
    assert rope is not None
    assert (rope.theta, rope.scaling, rope.interleaved) == (theta, scaling, False)
    assert rope.dim == read(name).layers[0].attention.head_dim


@pytest.mark.parametrize(
    ("name", "window"),
    [("Mistral-7B-v0.1", 4096), ("zephyr-7b-beta", 4096), ("Mistral-7B-Instruct-v0.3", None)],
)
def test_sliding_window(name: str, window: int | None) -> None:
    assert {layer.attention.window for layer in read(name).layers} == {window}


def test_head_size_is_read_where_it_is_not_the_quotient() -> None:
    attention = read("Mistral-Nemo-Base-2407").layers[0].attention
    assert (attention.head_dim, attention.num_heads) == (128, 32)  # 5120 / 32 is 160


def test_mixtral_routes_to_two_of_eight() -> None:
    ffn = read("Mixtral-8x7B-v0.1").layers[0].ffn
    assert ffn == MoEConfig(8, 2, 14336, aux_loss_coef=0.02)


@pytest.mark.parametrize("name", ["Llama-3.2-1B-Instruct", "SmolLM2-135M"])
def test_tied_embeddings(name: str) -> None:
    assert read(name).tie_embeddings


@pytest.mark.parametrize("name", CONFIGS)
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
