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
    "CodeLlama-7b-Instruct-hf": Facts(32, 4096, 32, 32, 11008, 32016, 16384, 6_738_546_688),
    "DeepSeek-R1-Distill-Llama-8B": Facts(32, 4096, 32, 8, 14336, 128256, 131072, 8_030_261_248),
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
    "SmolLM2-135M": Facts(30, 576, 9, 3, 1536, 49152, 8192, 134_515_008),
    "TinyLlama-1.1B-Chat-v1.0": Facts(22, 2048, 32, 4, 5632, 32000, 2048, 1_100_048_384),
    "Yi-6B-Chat": Facts(32, 4096, 32, 4, 11008, 64000, 4096, 6_061_035_520),
    "deepseek-coder-1.3b-instruct": Facts(24, 2048, 16, 16, 5504, 32256, 16384, 1_346_471_936),
    "dolphin-2.5-mixtral-8x7b": Facts(32, 4096, 32, 8, 14336, 32002, 32768, 46_702_809_088),
    "llama-7b": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "vicuna-13b-v1.3": Facts(40, 5120, 40, 40, 13824, 32000, 2048, 13_015_864_320),
    "vicuna-7b-v1.3": Facts(32, 4096, 32, 32, 11008, 32000, 2048, 6_738_415_616),
    "zephyr-7b-beta": Facts(32, 4096, 32, 8, 14336, 32000, 32768, 7_241_732_096),
}
# What must be refused, by the key: one of its publisher's own, which nobody else can know to be harmless; and
# weights that are not read.
REFUSED = {"ALLaM-7B-Instruct-preview": "internal_version", "Mistral-7B-Instruct-v0.2-GPTQ": "quantization_config"}


def content(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))


def read(name: str) -> ModelConfig:
    return read_config(content(name), ignore_config_keys=[REFUSED[name]] if name in REFUSED else [])[0]


def test_every_file_has_its_facts() -> None:
    assert set(CONFIGS) == set(FACTS)
    assert len(CONFIGS) >= 20


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


@pytest.mark.parametrize("name", TOKENIZER_CONFIGS)
def test_tokenizer_config_is_read(name: str, tmp_path: Path) -> None:
    """Beside a tokenizer.json that knows the special tokens; the rest of the vocabulary is no matter here."""
    values = json.loads((FOLDER / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    wanted = {key: values[key] for key in ("bos_token", "eos_token")}
    wanted = {key: token if isinstance(token, str) else token["content"] for key, token in wanted.items()}
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|endoftext|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.add_special_tokens(special)
    backend.save(str(tmp_path / "tokenizer.json"))
    for file in (FOLDER / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.bos_token_id == special.index(wanted["bos_token"])
    assert tokenizer.eos_token_id == special.index(wanted["eos_token"])
    has_template = "chat_template" in values or (tmp_path / "chat_template.jinja").exists()
    assert (tokenizer.chat_template is not None) == has_template
    if has_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Where is Tyre?"}])
        assert "Where is Tyre?" in chat
