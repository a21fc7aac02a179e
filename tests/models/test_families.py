"""Every family against a float64 decoder, transformers, and itself with a cache."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import Decoder
from families import GROUPS, OPTIONS, draw, old_spelling, write, write_llama_moe
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pyllama
from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.inspection import inspect
from pyllama.layers.ffn import MoE
from pyllama.model import Model

TOKENS = 75  # longer than the windows and than llama3 scaling's original context
CASES = [(family, seed) for family in OPTIONS for seed in range(20)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(211, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Model | PreTrainedModel, token_ids: Tensor) -> Tensor:
    """[T, V] of one sequence [T]."""
    out = model(token_ids[None])
    return (out if isinstance(out, Tensor) else out.logits)[0]


def error(found: Tensor, reference: Tensor) -> float:
    return (found.double() - reference).abs().max().item()


# What the cases of each family must have between them; a tuple of keys: together.
ON_OFF = {False, True}
WINDOWS = {"use_sliding_window": ON_OFF, "sliding_window": {7, 64}, "max_window_layers": {0, 1, 2, 28}}
SPARSE = {"norm_topk_prob": ON_OFF, "decoder_sparse_step": {1, 2}}
COVERED: dict[str, dict[Any, set[Any]]] = {
    "llama": {("attention_bias", "mlp_bias"): {(a, b) for a in ON_OFF for b in ON_OFF}},
    "mistral": {"sliding_window": {None, 7, 64}},
    "mixtral": {"sliding_window": {None, 7, 64}},
    "phi3": {"sliding_window": {None, 7, 64}, "original_max_position_embeddings": {40, 128, 256}},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | {"attention_bias": ON_OFF},
    "qwen3_moe": SPARSE | {"use_sliding_window": ON_OFF, "attention_bias": ON_OFF},
    "qwen2_moe": SPARSE | {"use_sliding_window": ON_OFF, "qkv_bias": ON_OFF},
    "olmoe": {"norm_topk_prob": ON_OFF, "attention_bias": ON_OFF, "clip_qkv": {None, 0.4, 1.5}},
    "glm4_moe": {
        ("attention_bias", "use_qk_norm"): {(a, b) for a in ON_OFF for b in ON_OFF},
        ("n_routed_experts", "n_group", "topk_group"): set(GROUPS),
        "first_k_dense_replace": {0, 1, 2, 5},
        "routed_scaling_factor": {1.0, 2.5},
        "n_shared_experts": {1, 2},
        "norm_topk_prob": ON_OFF,
    },
}


@pytest.mark.parametrize("family", OPTIONS)
def test_the_cases_cover_every_option(family: str) -> None:
    configs = [draw(family, seed) for other, seed in CASES if other == family]

    def seen(keys: str | tuple[str, ...]) -> set[Any]:
        return {
            config.get(keys) if isinstance(keys, str) else tuple(config.get(key) for key in keys) for config in configs
        }

    ropes = [config["rope_parameters"] for config in configs]
    kinds = {rope["rope_type"] for rope in ropes}
    assert kinds == ({"default", "longrope"} if family == "phi3" else {"default", "linear", "llama3", "yarn"})
    assert seen("tie_word_embeddings") == ON_OFF
    assert {config["num_attention_heads"] // config["num_key_value_heads"] for config in configs} == {1, 2, 4}
    sizes = [config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"] for config in configs]
    assert len(set(sizes)) > 2
    assert any(size & (size - 1) for size in sizes)  # not a power of two
    if family in ("phi3", "glm4_moe"):
        assert len({rope["partial_rotary_factor"] for rope in ropes}) > 1
    for keys, values in COVERED[family].items():
        assert seen(keys) >= values
    if "num_experts_per_tok" in configs[0]:
        experts = next(key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in configs[0])
        chosen = seen(("num_experts_per_tok", experts))
        assert any(top_k == 1 for top_k, _ in chosen)
        assert any(top_k == experts > 1 for top_k, experts in chosen)
        assert any(1 < top_k < experts for top_k, experts in chosen)
    if "mlp_only_layers" in configs[0]:
        sparse = {frozenset(sparse_layers(config)) for config in configs}
        assert frozenset() in sparse
        assert {frozenset(range(layers)) for layers in (1, 2, 3)} & sparse
        assert sparse - {frozenset(range(layers)) for layers in range(4)}  # some layers, not the first ones


def sparse_layers(config: dict[str, Any]) -> list[int]:
    """Qwen's layers with experts."""
    layers, without = config["num_hidden_layers"], config["mlp_only_layers"] or []
    return [i for i in range(layers) if i not in without and (i + 1) % config["decoder_sparse_step"] == 0]


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_are_as_near_to_float64_as_transformers(family: str, seed: int, tmp_path: Path) -> None:
    config = draw(family, seed)
    reference_model = write(tmp_path, config)
    token_ids = tokens(TOKENS, seed=seed)
    found = logits(pyllama.load(tmp_path, device="cpu"), token_ids)
    exact = Decoder(tmp_path)(token_ids)
    transformers_error = error(logits(reference_model, token_ids), exact)
    assert transformers_error < 1e-4 * exact.std()  # the two references are the same model
    assert error(found, exact) <= 3 * transformers_error

    old_spelling(tmp_path, drop=() if config.get("layer_types") else ["layer_types"])
    assert torch.equal(logits(pyllama.load(tmp_path, device="cpu"), token_ids), found)


def test_layer_types_alternate_windows(tmp_path: Path) -> None:
    """Ministral: the window holds in some layers only."""
    config = draw("mistral", 0) | {"model_type": "ministral", "num_hidden_layers": 3, "sliding_window": 9}
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    reference_model = write(tmp_path, config)
    token_ids = tokens(TOKENS)
    model = pyllama.load(tmp_path, device="cpu")
    assert [layer.attention.window for layer in model.config.layers] == [None, 9, None]
    exact = Decoder(tmp_path)(token_ids)
    transformers_error = error(logits(reference_model, token_ids), exact)
    assert transformers_error < 1e-4 * exact.std()
    assert error(logits(model, token_ids), exact) <= 3 * transformers_error


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False, "num_experts_per_tok": 3},
        {"num_experts_per_tok": 6, "tie_word_embeddings": False},
        {"num_local_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1},
    ],
)
def test_llama_moe_against_float64(changes: dict[str, Any], tmp_path: Path) -> None:
    write_llama_moe(tmp_path, **changes)
    token_ids = tokens(TOKENS)
    exact = Decoder(tmp_path)(token_ids)
    assert error(logits(pyllama.load(tmp_path, device="cpu"), token_ids), exact) < 1e-5 * exact.std()
    assert error(logits(pyllama.load(tmp_path, device="cpu", dtype="float64"), token_ids), exact) < 1e-6 * exact.std()


@pytest.fixture(scope="module", params=[*OPTIONS, "llama_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each family, in many shards with an index where transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama_moe":
        write_llama_moe(folder)
    else:
        config = draw(request.param, 5) | {"num_hidden_layers": 2, "tie_word_embeddings": False}
        config |= {key: None for key in ("layer_types", "mlp_only_layers") if key in config}
        write(folder, config, shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("checkpoint", OPTIONS, indirect=True)
def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompts = [tokens(length, seed=length).tolist() for length in (1, 5, 33, 64, 70)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        expected.append(out[0, len(prompt) :].tolist())
    model = pyllama.load(checkpoint, device="cpu")
    alone = [pyllama.generate(model, prompt, max_new_tokens=40).token_ids for prompt in prompts]
    batch = [completion.token_ids for completion in pyllama.generate(model, prompts, max_new_tokens=40)]
    assert [list(ids) for ids in alone] == expected
    assert [list(ids) for ids in batch] == expected


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_cached_decoding_equals_the_full_pass(checkpoint: Path, seed: int) -> None:
    """Three sequences, computed in random pieces of random sizes over shuffled pages."""
    pick = random.Random(seed)
    model = pyllama.load(checkpoint, device="cpu")
    lengths = [pick.randint(1, 140) for _ in range(3)]
    sequences = [tokens(length, seed=100 * seed + length) for length in lengths]
    full = [logits(model, sequence) for sequence in sequences]

    widest = max(pages_for(length) for length in lengths)
    cache = PagedCache(model.config, 3 * widest, "cpu", torch.float32)
    for layer in cache.layers:
        layer.fill_(float("nan"))  # what nobody wrote must not be read
    pages = pick.sample(cache.allocate(3 * widest), 3 * widest)
    block_table = torch.tensor(pages, dtype=torch.int32).view(3, widest)
    done = [0, 0, 0]
    while done != lengths:
        steps = [min(pick.choice([0, 1, 1, 7, 64, 90]), length - n) for length, n in zip(lengths, done, strict=True)]
        active = [b for b in range(3) if steps[b]]
        if not active:
            continue
        pieces = [sequences[b][done[b] : done[b] + steps[b]] for b in active]
        done = [n + step for n, step in zip(done, steps, strict=True)]
        whole = [lengths[b] for b in active]  # which LongRoPE's factors depend on
        batch = Batch.from_lengths(
            [steps[b] for b in active], [done[b] for b in active], block_table[active], PAGE_SIZE, whole
        )
        found = model.run(torch.cat(pieces), batch, cache)
        expected = torch.stack([full[b][done[b] - 1] for b in active])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.std().item())


@pytest.mark.parametrize("family", [*OPTIONS, "llama_moe"])
def test_what_is_inspected_is_what_is_loaded(family: str, tmp_path: Path) -> None:
    """Parameters, those of one token and the cache's bytes, by headers and configuration alone."""
    config = write_llama_moe(tmp_path) if family == "llama_moe" else draw(family, 1)
    if family != "llama_moe":
        write(tmp_path, config)
    model, facts = pyllama.load(tmp_path, "cpu"), inspect(tmp_path).model
    assert facts is not None
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        weight[0].numel() * (layer.ffn.config.num_experts - layer.ffn.config.top_k)
        for layer in model.layers
        if isinstance(layer.ffn, MoE)
        for weight in (layer.ffn.gate_up, layer.ffn.down)
    )
    assert facts.active_parameters == facts.parameters - idle
    assert facts.dtype == "F32"
    cache = PagedCache(model.config, 1, "cpu", torch.float32)
    assert facts.cache_bytes_per_token * PAGE_SIZE == sum(layer.nbytes for layer in cache.layers)
