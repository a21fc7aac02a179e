"""Generation against transformers, and each completion of a batch against itself alone."""

from __future__ import annotations

import gc
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, byte_level_tokenizer, sentencepiece_tokenizer, write_checkpoint
from transformers import LlamaForCausalLM

import pyllama
from pyllama import context
from pyllama.cache import PAGE_SIZE, PagedCache
from pyllama.generation import generate, stream
from pyllama.model import Model

EOS = 2
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(reference: LlamaForCausalLM, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_are_transformers(model: Model, reference: LlamaForCausalLM) -> None:
    """A ragged batch over page borders: one token, one page exactly, several pages."""
    prompts = prompts_of(1, 7, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 150)
    batch = generate(model, prompts, max_new_tokens=40)
    for prompt, completion in zip(prompts, batch, strict=True):
        expected = greedy(reference, prompt, 40)
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == EOS else "length")
        assert completion.prompt_tokens == len(prompt)
        assert generate(model, prompt, max_new_tokens=40).token_ids == expected


def test_repetition_penalty_is_transformers(model: Model, reference: LlamaForCausalLM) -> None:
    for prompt in prompts_of(5, 30):
        expected = greedy(reference, prompt, 30, repetition_penalty=1.3)
        assert generate(model, prompt, 30, repetition_penalty=1.3).token_ids == expected


def test_prompts_longer_than_a_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(5, 100, 1, 260, 3, 40)
    expected = [generate(model, prompt, 8).token_ids for prompt in prompts]
    monkeypatch.setattr(context, "PREFILL_TOKENS", 37)
    assert [out.token_ids for out in generate(model, prompts, 8)] == expected


@pytest.mark.parametrize("lengths", [[], [1], [7], [8], [3, 4, 1], [20, 1, 7], [8, 8], [5] * 9])
def test_passes_cover_every_token_once(lengths: list[int]) -> None:
    passes = list(context._passes(lengths, 8))
    assert all(sum(end - start for _, start, end in segments) == 8 for segments in passes[:-1])
    assert all(1 <= end - start <= 8 for segments in passes for _, start, end in segments)
    covered = [(b, i) for segments in passes for b, start, end in segments for i in range(start, end)]
    assert covered == [(b, i) for b, length in enumerate(lengths) for i in range(length)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logprobs": 2, "stop": ["e", "ou"], "ignore_eos": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_gives_each_what_it_gets_alone(model: Model, options: dict[str, Any]) -> None:
    """Prompts of every kind, that end at different times."""
    prompts = ["The quick", prompts_of(70)[0], CHAT, "with", [9], "Größe, 你好"]
    batch = generate(model, prompts, 24, **options)
    alone = [generate(model, prompt, 24, **options) for prompt in prompts]
    assert [out.token_ids for out in batch] == [out.token_ids for out in alone]
    assert [(out.text, out.finish_reason) for out in batch] == [(out.text, out.finish_reason) for out in alone]
    if "logprobs" in options:
        for a, b in zip(batch, alone, strict=True):
            assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_a_cache_the_tokens_are_the_same(model: Model, options: dict[str, Any]) -> None:
    prompts = ["The quick", *prompts_of(70)]
    cached, whole = (generate(model, prompts, 16, n=2, use_cache=c, **options) for c in (True, False))
    assert [out.token_ids for row in whole for out in row] == [out.token_ids for row in cached for out in row]


def test_without_a_cache_nothing_is_cached(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a cache was made")

    monkeypatch.setattr(PagedCache, "__init__", refuse)
    assert len(generate(model, [5], 3, use_cache=False).token_ids) == 3
    with pytest.raises(AssertionError, match="a cache was made"):
        generate(model, [5], 3)


def test_seeds_and_samples(model: Model) -> None:
    one = generate(model, "The", 12, temperature=1.0, seed=3)
    several = generate(model, "The", 12, temperature=1.0, seed=3, n=4)
    assert several[0].token_ids == one.token_ids
    assert len({tuple(out.token_ids) for out in several}) == 4
    again = generate(model, ["The", "with"], 12, temperature=1.0, seed=3, n=4)
    assert [out.token_ids for out in again[0]] == [out.token_ids for out in several]
    assert generate(model, "The", 12, temperature=1.0, seed=4).token_ids != one.token_ids
    torch.manual_seed(0)
    unseeded = [generate(model, "The", 12, temperature=1.0).token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    torch.manual_seed(0)
    assert generate(model, "The", 12, temperature=1.0).token_ids == unseeded[0]


@pytest.mark.parametrize("length", [3, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 9])
def test_samples_share_the_prompt_but_not_what_follows(model: Model, length: int) -> None:
    prompts = prompts_of(length, 4)
    samples = generate(model, prompts, 10, temperature=1.5, seed=8, n=3)
    for prompt, row in zip(prompts, samples, strict=True):
        for out in row:  # each must be what the model gives after its own tokens
            logits = model(torch.tensor([prompt + out.token_ids]))[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(out.token_ids)[:, None])
            found = generate(model, prompt, 10, temperature=1.5, seed=8, n=3, logprobs=0)[row.index(out)]
            assert found.token_ids == out.token_ids
            assert [x.logprob for x in found.logprobs] == pytest.approx(expected[:, 0].tolist(), abs=1e-3)


def test_logprobs_are_the_models_own(model: Model) -> None:
    """Whatever the sampling does to the distribution it draws from."""
    prompt = prompts_of(9)[0]
    out = generate(
        model, prompt, 8, logprobs=3, temperature=2.0, seed=1, top_k=50, repetition_penalty=1.5, ignore_eos=True
    )
    with torch.no_grad():
        logits = model(torch.tensor([prompt + out.token_ids]))[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)
    assert [entry.token_id for entry in out.logprobs] == out.token_ids
    for row, entry in zip(expected, out.logprobs, strict=True):
        values, ids = row.topk(3)
        assert list(entry.top) == ids.tolist()
        assert list(entry.top.values()) == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
    assert generate(model, prompt, 2).logprobs is None
    assert generate(model, prompt, 2, logprobs=0).logprobs[0].top == {}


def test_every_eos_id_ends_the_text(folder: Path, tmp_path: Path) -> None:
    """Of config.json, generation_config.json (a list) and the tokenizer."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = generate(pyllama.load(folder, "cpu"), "The quick", 10, ignore_eos=True)
    stops = {"config": first.token_ids[2], "list": first.token_ids[4]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, stops["list"]]}))
    model = pyllama.load(tmp_path, "cpu")
    out = generate(model, "The quick", 10)
    assert out.token_ids == first.token_ids[:5]
    assert out.finish_reason == "stop"
    assert out.text == model.tokenizer.decode(first.token_ids[:4]), "the stop is not part of the text"
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": stops["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert generate(pyllama.load(tmp_path, "cpu"), "The quick", 10).token_ids == first.token_ids[:3]
    ignored = generate(pyllama.load(tmp_path, "cpu"), "The quick", 10, ignore_eos=True)
    assert ignored.token_ids == first.token_ids
    assert ignored.finish_reason == "length"


def test_stop_token_ids(model: Model) -> None:
    free = generate(model, "The quick", 20)
    stop = free.token_ids[6]
    place = free.token_ids.index(stop)
    for options in ({}, {"ignore_eos": True}):
        out = generate(model, "The quick", 20, stop_token_ids=[stop, 7], **options)
        assert out.token_ids == free.token_ids[: place + 1]
        assert (out.finish_reason, out.text) == ("stop", model.tokenizer.decode(free.token_ids[:place]))


def test_a_special_token_as_stop_string(model: Model) -> None:
    """It never shows in the text, so only its id can end it."""
    special = model.tokenizer.special_id("<|user|>")
    candidates = torch.randint(5, VOCAB_SIZE, (3000, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = model(candidates)[:, -1].argmax(-1)
    prompt = candidates[after == special][0].tolist()
    assert generate(model, prompt, 1).token_ids == [special]
    out = generate(model, prompt, 5, stop="<|user|>")
    assert (out.token_ids, out.text, out.finish_reason) == ([special], "", "stop")
    assert len(generate(model, prompt, 5, stop="user").token_ids) > 1


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_stop_strings_end_the_text_and_never_leak(tokenizer: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer(), seed=3)
    model = pyllama.load(tmp_path, "cpu")
    free = generate(model, "fox", 40, ignore_eos=True)
    assert free.text == model.tokenizer.decode(free.token_ids)
    # A random model also writes bytes that are no text; a stop string is text.
    places = [(start, start + length) for start in range(len(free.text) - 8) for length in range(1, 8)]
    stops = [stop for start, end in places if "�" not in (stop := free.text[start:end])]
    assert stops
    for stop in random.Random(0).choices(stops, k=20):
        out = generate(model, "fox", 40, ignore_eos=True, stop=[stop, "never there"])
        assert out.text == free.text[: free.text.index(stop)]
        assert out.finish_reason == "stop"
        assert out.token_ids == free.token_ids[: len(out.token_ids)]
        assert "".join(chunk.text for chunk in stream(model, "fox", 40, ignore_eos=True, stop=stop)) == out.text


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streams_add_up_to_completions(model: Model, options: dict[str, Any]) -> None:
    prompts = ["The quick", [9], CHAT]
    chunks = list(stream(model, prompts, 20, n=2, **options))
    completions = generate(model, prompts, 20, n=2, **options)
    for index, sample in itertools.product(range(3), range(2)):
        own = [chunk for chunk in chunks if (chunk.index, chunk.sample) == (index, sample)]
        expected = completions[index][sample]
        assert "".join(chunk.text for chunk in own) == expected.text
        assert [token for chunk in own for token in chunk.token_ids] == expected.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [expected.finish_reason]
        assert [chunk.completion is None for chunk in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].completion.text == expected.text
        if "logprobs" in options:
            assert [entry for chunk in own for entry in chunk.logprobs] == own[-1].completion.logprobs


def test_a_stream_comes_token_by_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed ahead of what is asked for."""
    runs = 0
    run = Model._hidden

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(*args)

    monkeypatch.setattr(Model, "_hidden", counted)
    for tokens, _ in enumerate(stream(model, "The quick", 6, ignore_eos=True), start=1):
        assert runs == tokens
    assert runs == 6


def test_leaving_a_stream_early_frees_everything(model: Model) -> None:
    chunks = stream(model, ["The quick", "fox"], 50)
    next(chunks)
    assert any(type(thing) is PagedCache for thing in gc.get_objects())
    gc.disable()
    try:
        chunks.close()
        assert not any(type(thing) is PagedCache for thing in gc.get_objects()), "freed at once"
    finally:
        gc.enable()


def test_an_interrupted_call_leaves_the_model_usable(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, "The quick", 10).token_ids
    run, calls = Model._hidden, itertools.count()

    def interrupted(*args: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(Model, "_hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, "The quick", 10)
    monkeypatch.undo()
    assert not torch.is_inference_mode_enabled()
    assert generate(model, "The quick", 10).token_ids == expected


def test_streams_do_not_disturb_each_other_or_gradients(model: Model) -> None:
    expected = [generate(model, prompt, 8).token_ids for prompt in ("The quick", "fox")]
    both = [stream(model, prompt, 8) for prompt in ("The quick", "fox")]
    found: list[list[int]] = [[], []]
    for pair in zip(*both, strict=True):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        for i, chunk in enumerate(pair):
            found[i] += chunk.token_ids
    assert found == expected
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.embedding.weight.grad is not None
    model.zero_grad()
