"""Options of generation and the state of sampling; the op `sample` has its own test."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pyllama.sampling import Sampler, SamplingParams, derived_seed, logprobs_of, token_logprobs

CPU = torch.device("cpu")
V = 50


def sampler(params: SamplingParams, seeds: list[int], prompts: list[list[int]] | None = None) -> Sampler:
    return Sampler(params, prompts or [[1]] * len(seeds), seeds, V, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite in float32, got -0.5"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite in float32, got inf"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite in float32, got nan"),
        ({"temperature": 1e39}, r"temperature must be at least 0 and finite in float32, got 1e\+39"),
        ({"repetition_penalty": 1e39}, r"repetition_penalty must be above 0 and finite in float32, got 1e\+39"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be above 0 and finite in float32, got 1e-46"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 1, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1, got -0.1"),
        ({"min_p": 2}, "min_p must be between 0 and 1, got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0 and finite in float32, got 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2, got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2, got -3"),
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*63, got -1"),
        ({"seed": 2**63}, r"seed must be at least 0 and below 2\*\*63, got 9223372036854775808"),
        ({"logprobs": -1}, "logprobs must be at least 0, got -1"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"stop": ""}, "stop must not be or hold the empty string, got ''"),
        ({"stop": ["a", ""]}, "stop must not be or hold the empty string"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, got 1.5"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"logprobs": True}, "logprobs must be an integer, got True"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"stop": 5}, "stop must be a list of strings, got 5"),
        ({"stop": ["a", 5]}, "stop must be a list of strings"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a list of integers"),
        ({"stop_token_ids": 2}, "stop_token_ids must be a list of integers, got 2"),
        ({"stop_token_ids": 0}, "stop_token_ids must be a list of integers, got 0"),
        ({"stop_token_ids": ""}, "stop_token_ids must be a list of integers, got ''"),
        ({"stop_token_ids": b"ab"}, "stop_token_ids must be a list of integers, got b'ab'"),
        ({"stop_token_ids": [True]}, r"stop_token_ids must be a list of integers, got \[True\]"),
        ({"stop_token_ids": False}, "stop_token_ids must be a list of integers, got False"),
        ({"stop": False}, "stop must be a list of strings, got False"),
        ({"stop": 0}, "stop must be a list of strings, got 0"),
        ({"stop": b""}, "stop must be a list of strings, got b''"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_values_of_another_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingParams(**options)


def test_values_that_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=10**9, top_p=1, min_p=1, seed=2**63 - 1, logprobs=0)
    SamplingParams(temperature=np.float32(0.5), max_new_tokens=np.int64(3), presence_penalty=-2)
    SamplingParams(temperature=1e-45, repetition_penalty=1e38)
    SamplingParams(stop=[], stop_token_ids=np.arange(3).tolist())
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"], stop_token_ids={3}).stop_strings == ("ab", "c")


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    logits = torch.randn(6, V)
    logits[0, [7, 30, 31]] = 9.0
    chosen = sampler(SamplingParams(), [0] * 6).choose(logits)
    assert chosen.dtype == torch.int64
    assert chosen[0] == 7
    assert chosen.tolist() == logits.numpy().argmax(axis=1).tolist()


def test_a_seed_draws_the_same_in_any_company() -> None:
    """Alone, in a batch, and after others have left, over several steps."""
    torch.manual_seed(0)
    params = SamplingParams(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01)
    logits = torch.randn(10, 4, V)
    seeds = [11, 2**62 + 1, 11, 0]
    together = sampler(params, seeds)
    drawn = [together.choose(step) for step in logits[:5]]
    together.keep(torch.tensor([3, 1]))
    drawn += [together.choose(step[[3, 1]]) for step in logits[5:]]
    for row, kept in ((1, 1), (3, 0)):
        alone = sampler(params, [seeds[row]])
        expected = [int(alone.choose(step[row : row + 1])) for step in logits]
        assert [int(d[row if i < 5 else kept]) for i, d in enumerate(drawn)] == expected
    same_seed_and_logits = sampler(params, [5, 5, 6])
    first = [same_seed_and_logits.choose(step[:1].expand(3, V)).tolist() for step in logits]
    assert all(a == b for a, b, _ in first)
    assert any(a != c for a, _, c in first), "another seed draws differently"


def test_penalties_follow_their_formulas_from_step_to_step() -> None:
    """Greedy choice after penalties, against numpy in float64 with counts of its own."""
    rng = np.random.default_rng(0)
    prompts = [[3, 4, 3], [V - 1], list(range(V))]
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3)
    penalized = sampler(params, [0, 0, 0], prompts)
    counts, rows = np.zeros((3, V)), np.arange(3)
    for step in range(12):
        if step == 8:
            rows = np.array([2, 0])
            penalized.keep(torch.from_numpy(rows))
        logits = rng.normal(size=(len(rows), V))
        expected = []
        for i, row in enumerate(rows):
            x = logits[i].copy()
            seen = counts[row] > 0
            seen[prompts[row]] = True
            x = np.where(seen, np.where(x > 0, x / 1.7, x * 1.7), x)
            x -= 0.4 * (counts[row] > 0) + 0.3 * counts[row]
            expected.append(int(x.argmax()))
            counts[row, expected[-1]] += 1
        assert penalized.choose(torch.from_numpy(logits)).tolist() == expected


def test_penalties_apply_at_temperature_too() -> None:
    """A frequency penalty of 2 nearly forbids what was just drawn, where it was nearly certain."""
    logits = torch.zeros(1, V)
    logits[0, 5] = 2.5
    params = SamplingParams(temperature=0.05, frequency_penalty=2.0)
    one = sampler(params, [3])
    assert [int(one.choose(logits)) for _ in range(2)] == [5, 5]
    assert int(one.choose(logits)) != 5


def test_seeds_of_samples() -> None:
    assert SamplingParams(seed=7, n=3).seeds()[0] == 7
    seeds = [derived_seed(seed, i) for seed in range(50) for i in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in [*seeds, derived_seed(2**63 - 1, 5)])
    # SplitMix64's published first outputs for the state 0 (less the sign bit).
    assert derived_seed(0, 1) == 0xE220A8397B1DCDAF % 2**63
    assert derived_seed(0, 2) == 0x6E789E6AA1B965F4 % 2**63


def test_without_a_seed_the_default_generator_decides() -> None:
    params = SamplingParams(temperature=1.0, n=2)
    torch.manual_seed(3)
    first, second = params.seeds(), params.seeds()
    torch.manual_seed(3)
    assert params.seeds() == first
    assert len({*first, *second}) == 4
    state = torch.get_rng_state()
    SamplingParams(n=2).seeds()
    assert torch.equal(torch.get_rng_state(), state), "greedy decoding leaves the generator alone"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logprobs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, V)).to(dtype)
    tokens = torch.tensor([4, 0, V - 1])
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, found in enumerate(token_logprobs(tokens, *logprobs_of(logits, tokens, 4))):
        assert found.token_id == tokens[row]
        assert found.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        order = sorted(range(V), key=lambda v: -float(expected[row, v]))[:4]
        assert [expected[row, token] for token in found.top] == [expected[row, token] for token in order]
        assert list(found.top.values()) == pytest.approx([float(expected[row, v]) for v in order], abs=1e-5)
    assert token_logprobs(tokens, *logprobs_of(logits, tokens, 0))[0].top == {}
