"""What `pyllama bench` counts: the shapes of well-known models, what they must read and multiply, random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

import pyllama
from pyllama.architectures import read_config
from pyllama.bench.engines import Timing, random_model
from pyllama.bench.figures import Figures, figures
from pyllama.bench.limits import Limits, product, read
from pyllama.bench.shapes import SHAPES, find_shape, first_layers
from pyllama.bench.work import Cell, Work, active_parameters, cache_bytes, chosen_share, prompt_work, step_work
from pyllama.cache import free_memory
from pyllama.config import GQAConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig
from pyllama.model import Model

CONFIGS = Path(__file__).parent / "configs"
CPU = torch.device("cpu")
# The checkpoints whose shapes they are; of Qwen3-0.6B there is no file here.
CHECKPOINTS = {
    "smollm2-135m": "SmolLM2-135M",
    "tinyllama-1.1b": "TinyLlama-1.1B-Chat-v1.0",
    "llama-2-7b": "Llama-2-7b-hf",
    "llama-3.2-1b": "Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "llama-3.1-405b": "Llama-3.1-405B",
    "mistral-7b": "Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b": "Mixtral-8x7B-v0.1",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-32b": "Qwen3-32B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B-Instruct-2507",
    "olmoe-1b-7b": "OLMoE-1B-7B-0125-Instruct",
    "phi-4": "phi-4",
    "phi-4-mini": "Phi-4-mini-instruct",
    "deepseek-v2-lite": "DeepSeek-V2-Lite-Chat",
    "deepseek-r1": "DeepSeek-R1",
    "glm-4.5-air": "GLM-4.5-Air",
}


def on_meta(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shapes_are_the_published_ones(name: str) -> None:
    published = json.loads((CONFIGS / CHECKPOINTS[name] / "config.json").read_text(encoding="utf-8"))
    assert read_config(SHAPES[name])[0] == read_config(published)[0]


def test_the_shape_without_a_file() -> None:
    """Its model card: 0.6 billion parameters, 0.44 billion of them not in the embedding."""
    assert set(SHAPES) - set(CHECKPOINTS) == {"qwen3-0.6b"}
    model = on_meta(read_config(SHAPES["qwen3-0.6b"])[0])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e9, 1) == 0.6
    assert round((count - model.embedding.weight.numel()) / 1e9, 2) == 0.44


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_builds_as_many_parameters_of_the_first_layers(name: str) -> None:
    values = first_layers(SHAPES[name], 2)
    model = on_meta(read_config(values)[0])
    assert len(model.layers) == 2
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    ours = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert ours == sum(parameter.numel() for parameter in theirs.parameters())


def test_unknown_shapes_name_the_known_ones_closest_first() -> None:
    with pytest.raises(ValueError, match=r"no shape Lama-3\.1-8b.*known shapes: llama-3\.1-8b, .*deepseek-r1"):
        find_shape("Lama-3.1-8b")


def test_work_of_a_dense_model() -> None:
    """Against the formula, for hand-made sizes: 2 layers, D 128, F 96, 4 query and 2 key heads of 32, V 300."""
    config, _ = read_config(CONFIG)
    qkv, out, ffn, head = 128 * (4 + 2 + 2) * 32, 4 * 32 * 128, 3 * 128 * 96, 300 * 128
    products, norms = 2 * (qkv + out + ffn), 5 * 128
    entry = 2 * 2 * 2 * 32  # numbers of a token in the caches of both layers
    cell = Cell(batch=3, context=10, new_tokens=5)
    seen = sum(range(11, 15)) / 4  # keys, by the steps' queries at positions 10 to 13
    step = step_work(on_meta(config), cell)
    assert step.bytes_read == 4 * (products + norms + head + 3 * 128 + 3 * seen * entry)
    assert step.flops == 3 * (2 * (products + head) + 2 * 4 * 4 * 32 * seen)
    prompt = prompt_work(on_meta(config), cell)
    assert prompt.bytes_read == 4 * (products + norms + head)
    assert prompt.flops == 3 * (10 * 2 * products + 2 * head + 2 * 4 * 4 * 32 * 55)
    assert cache_bytes(on_meta(config), cell) == 4 * 3 * 64 * entry
    tied = replace(config, tie_embeddings=True)  # the same is read, and there is no other embedding for rows
    assert step_work(on_meta(tied), cell) == step
    attention = config.layers[0].attention
    assert isinstance(attention, GQAConfig)
    windowed = tuple(replace(layer, attention=replace(attention, window=4)) for layer in config.layers)
    narrow = step_work(on_meta(replace(config, layers=windowed)), cell)
    assert step.bytes_read - narrow.bytes_read == 4 * 3 * (seen - 4) * entry


def test_work_of_experts_and_latent_attention() -> None:
    config, _ = read_config(SHAPES["deepseek-v2-lite"])
    dense, moe = config.layers[0], config.layers[1]
    attention = moe.attention
    assert isinstance(attention, MLAConfig)
    assert isinstance(moe.ffn, MoEConfig)
    assert isinstance(dense.ffn, MLPConfig)
    model = on_meta(replace(config, layers=(dense, moe)))
    whole = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 2048 * 1408
    assert active_parameters(model) == pytest.approx(whole - 58 * expert)
    near, far = (step_work(model, Cell(1, context, 2)) for context in (100, 101))
    assert far.bytes_read - near.bytes_read == 2 * 4 * (512 + 64)  # one entry in each layer's cache
    assert far.flops - near.flops == 2 * 2 * 16 * (512 + 64 + 512)
    assert near.bytes_read == pytest.approx(
        4 * (whole - 102400 * 2048 - 58 * expert + 2048 + 2 * (512 + 64) * 101), rel=1e-9
    )
    short, long = (prompt_work(model, Cell(1, context, 2)) for context in (1, 2))
    head = 102400 * 2048
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    per_token = 2 * (whole - 2 * head - 58 * expert - norms)
    assert long.flops - short.flops == pytest.approx(per_token + 2 * 2 * 2 * 16 * (128 + 64 + 128), rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_the_share_of_chosen_experts_is_what_chance_gives(tokens: int) -> None:
    moe = MoEConfig(num_experts=16, top_k=3, size=1)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2000, tokens, 16, generator=generator).topk(3).indices
    found = torch.zeros(2000, 16).scatter_(1, chosen.flatten(1), 1.0).mean().item()
    assert chosen_share(moe, tokens) == pytest.approx(found, abs=0.01)


def test_figures() -> None:
    cell, limits = Cell(batch=4, context=100, new_tokens=11), Limits(bytes_per_second=1e9, flops_per_second=1e10)
    timings = [Timing(0.5, 2.0), Timing(0.4, 3.0), Timing(9.0, 1.0)]
    found = figures(cell, timings, (Work(1e8, 1e9), Work(1e8, 1e7)), limits, 5)
    assert found == Figures(
        prompt_tokens_per_second=pytest.approx(800),
        first_token_seconds=0.5,
        prompt_share=pytest.approx(0.2),  # both take 0.1 seconds at least
        tokens_per_second=pytest.approx(20),
        step_seconds=pytest.approx(0.2),
        step_bytes=1e8,
        step_share=pytest.approx(0.5),  # bound by the bytes: 0.1 of 0.2 seconds
        peak_bytes=5,
    )


def test_limits_do_what_they_count() -> None:
    x = read(4096, 2, "cpu")
    assert (x.amount, [way(1).item() for way in x.ways]) == (4096, [1024.0])
    y = product(torch.bfloat16, "cpu", 8)
    assert (y.amount, y.ways[0](0).shape, y.ways[0](0).dtype) == (1024, (8, 8), torch.bfloat16)


def test_random_weights_repeat_and_generate() -> None:
    values = first_layers(SHAPES["deepseek-r1"], 4) | {"hidden_size": 64, "vocab_size": 100, "intermediate_size": 32}
    values |= {"q_lora_rank": 16, "moe_intermediate_size": 8, "n_routed_experts": 16, "num_attention_heads": 2}
    config, _ = read_config(values | {"num_key_value_heads": 2})
    model, again = (random_model(config, CPU, torch.bfloat16) for _ in range(2))
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
        assert weight.isfinite().all()
        assert weight.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
    assert len(pyllama.generate(model, [1, 2, 3], 5, ignore_eos=True).token_ids) == 5
    assert model(torch.tensor([[1, 2, 3]])).std() > 0.1


def test_a_model_that_does_not_fit_says_how_many_layers_do() -> None:
    config, _ = read_config(SHAPES["llama-3.1-405b"] | {"num_hidden_layers": 1000})
    with pytest.raises(MemoryError, match=r"random weights in .* need [\d.]+ GB, and [\d.]+ GB are free") as info:
        random_model(config, CPU, torch.bfloat16)
    layer = sum(
        parameter.numel() for parameter in on_meta(replace(config, layers=config.layers[:1])).layers.parameters()
    )
    rest = 2 * 2 * 128256 * 16384
    words = str(info.value).split()
    if "--layers" in words:
        layers = int(words[words.index("--layers") + 1])
        room = (free_memory(CPU) - rest) / (2 * layer)
        assert abs(room - layers) < 1.5  # other processes take and give memory meanwhile
    else:
        assert free_memory(CPU) < rest + 2.5 * layer
