"""DeepSeek's models against a float64 decoder, transformers, and themselves with a cache and under other names."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_decoder import DeepseekDecoder
from families import old_spelling, write
from test_families import TOKENS, error, logits, tokens
from test_families import test_cached_decoding_equals_the_full_pass as cached_decoding_equals_the_full_pass
from test_families import test_greedy_tokens_equal_transformers as greedy_tokens_equal_transformers

import pyllama

FAMILIES = "deepseek_v2", "deepseek_v3"
CASES = [(family, seed) for family in FAMILIES for seed in range(20)]
ORIGINAL = 32  # the context that scaled RoPE begins from; the tests' sequences are longer
YARN = {"rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}


def draw(family: str, seed: int) -> dict[str, Any]:
    """A random configuration of the family, in transformers' own keys."""
    pick = random.Random(f"{family} {seed}").choice
    v3 = family == "deepseek_v3"
    groups, size = pick([1, 2, 4]), pick([2, 3, 4] if v3 else [1, 2, 3])
    chosen = pick(range(1, groups + 1))
    layers = pick([2, 3])
    rope = pick([{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, YARN, YARN, YARN])
    if rope is YARN:
        rope = rope | {"factor": pick([4.0, 40.0])}
        rope |= pick([{}, {"beta_fast": 4, "beta_slow": 0.25}, {"beta_fast": 1.0, "beta_slow": 1.0}])
        mscales = pick([(), (1.0, 0.0), (1.0, 1.0), (0.707, 0.707), (1.3, 0.6)])
        rope |= dict(zip(("mscale", "mscale_all_dim"), mscales, strict=False))
    heads = pick([1, 2, 3, 4])
    config = {
        "model_type": family,
        "vocab_size": 211,
        "hidden_size": pick([48, 96]),
        "intermediate_size": pick([40, 72]),
        "moe_intermediate_size": pick([16, 28]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pick([heads, None]),
        "q_lora_rank": pick([None, 12, 40]),
        "kv_lora_rank": pick([8, 36]),
        "qk_nope_head_dim": pick([4, 18]),
        "qk_rope_head_dim": pick([2, 8, 16]),
        "v_head_dim": pick([6, 24]),
        "attention_bias": pick([False, True]),
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": chosen,
        "num_experts_per_tok": pick([1, *range(1, chosen * size + 1)]),
        "n_shared_experts": pick([1, 2]),
        "first_k_dense_replace": pick(range(layers)),
        "routed_scaling_factor": pick([1.0, 2.5]),
        "max_position_embeddings": 256,
        "rms_norm_eps": pick([1e-6, 1e-2]),  # the latents' norms keep 1e-6
        "tie_word_embeddings": pick([False, True]),
        "rope_parameters": rope | {"rope_theta": pick([1e4, 5e5])},
        "eos_token_id": None,
    }
    if v3:
        return config | {"norm_topk_prob": pick([False, True]), "rope_interleave": pick([False, True])}
    return config | {"mlp_bias": pick([False, True]), "topk_method": pick(["greedy", "group_limited_greedy"])}


def test_the_cases_cover_every_option() -> None:
    def seen(read: Callable[[dict[str, Any]], Any], family: str) -> set[Any]:
        return {read(draw(family, seed)) for _, seed in CASES[:20]}

    for family in FAMILIES:
        for key in ("q_lora_rank", "attention_bias", "n_shared_experts", "routed_scaling_factor", "rms_norm_eps"):
            assert len(seen(lambda c, key=key: c[key], family)) > 1
        assert seen(lambda c: c["first_k_dense_replace"], family) >= {0, 1, 2}
        assert seen(lambda c: (c["q_lora_rank"] is None, c["attention_bias"]), family) >= {(True, True), (False, True)}
        ropes = seen(lambda c: tuple(c["rope_parameters"].get(key) for key in ("rope_type", "mscale")), family)
        assert ropes >= {("default", None), ("linear", None), *(("yarn", m) for m in (None, 1.0, 0.707, 1.3))}
        assert seen(lambda c: c["num_experts_per_tok"] == 1, family) == {False, True}
        limited = seen(lambda c: (c["topk_group"] < c["n_group"], c.get("topk_method", "")[:5]), family)
        assert (True, "group" if family == "deepseek_v2" else "") in limited
    assert seen(lambda c: c["topk_method"], "deepseek_v2") == {"greedy", "group_limited_greedy"}
    assert len(seen(lambda c: (c["norm_topk_prob"], c["rope_interleave"]), "deepseek_v3")) == 4


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_are_as_near_to_float64_as_transformers(family: str, seed: int, tmp_path: Path) -> None:
    reference_model = write(tmp_path, draw(family, seed))
    token_ids = tokens(TOKENS, seed=seed)
    found = logits(pyllama.load(tmp_path, device="cpu"), token_ids)
    exact = DeepseekDecoder(tmp_path)(token_ids)
    transformers_error = error(logits(reference_model, token_ids), exact)
    assert transformers_error < 1e-4 * exact.std()  # the two references are the same model
    assert error(found, exact) <= 3 * transformers_error

    old_spelling(tmp_path)
    assert torch.equal(logits(pyllama.load(tmp_path, device="cpu"), token_ids), found)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, draw(request.param, 1) | {"num_hidden_layers": 2, "first_k_dense_replace": 1}, shard_size="60KB")
    return folder


def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    greedy_tokens_equal_transformers(checkpoint)


@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_equals_the_full_pass(checkpoint: Path, seed: int) -> None:
    cached_decoding_equals_the_full_pass(checkpoint, seed)
