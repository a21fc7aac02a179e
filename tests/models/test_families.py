"""Every family against a float64 decoder, transformers, and itself with a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import Decoder
from families import draw, old_spelling, write, write_llama_moe
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pyllama
from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.model import Model

TOKENS = 75  # longer than the windows and than llama3 scaling's original context
CASES = [(family, seed) for family in ("llama", "mistral", "mixtral") for seed in range(20)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(211, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Model | PreTrainedModel, token_ids: Tensor) -> Tensor:
    """[T, V] of one sequence [T]."""
    out = model(token_ids[None])
    return (out if isinstance(out, Tensor) else out.logits)[0]


def error(found: Tensor, reference: Tensor) -> float:
    return (found.double() - reference).abs().max().item()


def test_the_cases_cover_every_option() -> None:
    def seen(read: Callable[[dict[str, Any]], Any], *families: str) -> set[Any]:
        return {read(draw(family, seed)) for family, seed in CASES if family in families}

    every = "llama", "mistral", "mixtral"
    for family in every:
        ropes = seen(lambda c: (c["rope_parameters"]["rope_type"], c["rope_parameters"]["rope_theta"]), family)
        assert {rope for rope, _ in ropes} == {"default", "linear", "llama3"}
        assert seen(lambda c: c["tie_word_embeddings"], family) == {False, True}
        assert seen(lambda c: c["head_dim"], family) >= {None, 20, 32}  # derived; not a power of two
        assert seen(lambda c: c["num_attention_heads"] // c["num_key_value_heads"], family) == {1, 2, 4}
    assert len(seen(lambda c: (c["attention_bias"], c["mlp_bias"]), "llama")) == 4
    for family in ("mistral", "mixtral"):
        assert seen(lambda c: c["sliding_window"], family) == {None, 7, 64}
    chosen = seen(lambda c: (c["num_experts_per_tok"], c["num_local_experts"]), "mixtral")
    assert any(top_k == 1 for top_k, _ in chosen)
    assert any(top_k == experts > 1 for top_k, experts in chosen)
    assert any(1 < top_k < experts for top_k, experts in chosen)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_are_as_near_to_float64_as_transformers(family: str, seed: int, tmp_path: Path) -> None:
    reference_model = write(tmp_path, draw(family, seed))
    token_ids = tokens(TOKENS, seed=seed)
    found = logits(pyllama.load(tmp_path, device="cpu"), token_ids)
    exact = Decoder(tmp_path)(token_ids)
    transformers_error = error(logits(reference_model, token_ids), exact)
    assert transformers_error < 1e-4 * exact.std()  # the two references are the same model
    assert error(found, exact) <= 3 * transformers_error

    old_spelling(tmp_path)
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


@pytest.fixture(scope="module", params=["llama", "mistral", "mixtral", "llama_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each family, in many shards with an index where transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama_moe":
        write_llama_moe(folder)
    else:
        config = draw(request.param, 1) | {"num_hidden_layers": 2}
        write(folder, config, shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("checkpoint", ["llama", "mistral", "mixtral"], indirect=True)
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
        batch = Batch.from_lengths(
            [steps[b] for b in active], [done[b] for b in active], block_table[active], PAGE_SIZE
        )
        found = model.run(torch.cat(pieces), batch, cache)
        expected = torch.stack([full[b][done[b] - 1] for b in active])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.std().item())
