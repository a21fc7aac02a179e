"""What `generate` takes as a prompt, what it refuses, and where the context ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, write_checkpoint
from transformers import PreTrainedTokenizerFast

import pyllama
from pyllama.generation import generate, stream
from pyllama.model import Model
from pyllama.text import Completion

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Without a tokenizer, and with a short context."""
    path = tmp_path_factory.mktemp("bare")
    write_checkpoint(path, seed=1, max_position_embeddings=24)
    return pyllama.load(path, device="cpu", dtype="float32")


def test_the_context_ends_a_completion(bare: Model) -> None:
    """24 tokens, prompt and new ones together."""
    out = generate(bare, [[5] * 20, [5] * 23, [6]], 128, ignore_eos=True)
    assert [len(one.token_ids) for one in out] == [4, 1, 23]
    assert {one.finish_reason for one in out} == {"length"}
    whole = generate(bare, [5] * 20, 128, ignore_eos=True, use_cache=False)
    assert whole.token_ids == out[0].token_ids


def test_kinds_of_prompts_and_results(model: Model, folder: Path) -> None:
    tokenizer = model.tokenizer
    text = generate(model, "The quick", 3)
    assert isinstance(text, Completion)
    assert str(text) == text.text == tokenizer.decode(text.token_ids)
    assert generate(model, tokenizer.encode("The quick"), 3).token_ids == text.token_ids
    assert generate(model, tuple(tokenizer.encode("The quick")), 3).token_ids == text.token_ids
    template = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template
    ids = template(CHAT, add_generation_prompt=True, return_dict=False)
    chat = generate(model, CHAT, 3)
    assert (chat.prompt_tokens, chat.token_ids) == (len(ids), generate(model, ids, 3).token_ids)
    assert [out.token_ids for out in generate(model, [CHAT, "The quick"], 3)] == [chat.token_ids, text.token_ids]
    assert [len(row) for row in generate(model, ["The"], 3, n=2)] == [2]
    assert isinstance(generate(model, ["The"], 3), list)
    assert [out.prompt_tokens for out in generate(model, "The", 3, n=2)] == [len(tokenizer.encode("The"))] * 2
    assert min(text.prompt_seconds, text.generation_seconds) > 0
    for source in (folder, str(folder)):
        assert generate(source, "The quick", 3).token_ids == text.token_ids


def test_without_a_tokenizer_token_ids_do(bare: Model) -> None:
    out = generate(bare, [5, 6], 4)
    assert out.text == ""
    assert 1 <= len(out.token_ids) <= 4


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, ValueError, "prompt is empty"),
        ([], {}, ValueError, "prompt is empty: it has 0 tokens, and at least 1 is needed"),
        (["The", []], {}, ValueError, "prompt 1 is empty"),
        (["The", ""], {}, ValueError, "prompt 1 is empty"),
        ([5, VOCAB_SIZE], {}, ValueError, "token id 400 at place 1; the vocabulary is 0 to 399"),
        ([[5], [5, -1]], {}, ValueError, "prompt 1 has token id -1 at place 1; the vocabulary is 0 to 399"),
        ([5] * 600, {}, ValueError, "prompt has 600 tokens; the context holds 512, .* at most 511"),
        ([5] * 512, {}, ValueError, "prompt has 512 tokens; the context holds 512"),
        ([5, "a"], {}, TypeError, "must hold token ids only, got 'a' at place 1"),
        ([5, 6.0], {}, TypeError, "must hold token ids only, got 6.0 at place 1"),
        ([[[5]]], {}, TypeError, "prompt 0 must be text, token ids or chat messages"),
        (5, {}, TypeError, "prompt must be text, a list of token ids, .* got int"),
        (None, {}, TypeError, "got NoneType"),
        (torch.tensor([5]), {}, TypeError, "got Tensor"),
        (b"The", {}, TypeError, "prompt must be text, a list of token ids, .* got bytes: b'The'"),
        (bytearray(b"The"), {}, TypeError, "got bytearray"),
        (["The", b"The"], {}, TypeError, "prompt 1 must be text, .* got bytes: b'The'"),
        ([True, 5], {}, TypeError, "must hold token ids only, got True at place 0"),
        ([{"content": "no role"}], {}, ValueError, "message 0 of the chat needs a 'role'"),
        ("The", {"temperature": -1}, ValueError, "temperature must be at least 0 and finite in float32, got -1"),
        ("The", {"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ("The", {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ("The", {"stop_token_ids": [400]}, ValueError, "stop_token_ids has 400; the vocabulary is 0 to 399"),
        ("The", {"logprobs": 401}, ValueError, "logprobs must be at most the 400 tokens there are, got 401"),
        ("The", {"stop_token_ids": 0}, TypeError, "stop_token_ids must be a list of integers, got 0"),
        ("The", {"stop": False}, TypeError, "stop must be a list of strings, got False"),
        ("The", {"use_cache": 0}, TypeError, "use_cache must be True or False, got 0"),
        ("The", {"max_tokens": 5}, TypeError, "max_tokens"),
        ("The", {"top_k": "5"}, TypeError, "top_k must be an integer, got '5'"),
    ],
)
def test_bad_input(
    model: Model, call: Any, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(model, prompt, **options)


def test_bad_input_to_a_checkpoint_without_tokenizer_or_template(bare: Model, model: Model) -> None:
    for prompt in ("text", CHAT, [[5], "text"]):
        with pytest.raises(ValueError, match=r"is text, but the checkpoint has no tokenizer\.json"):
            generate(bare, prompt)
    with pytest.raises(ValueError, match="stop needs text, but the checkpoint has no tokenizer"):
        generate(bare, [5], stop="a")
    with pytest.raises(TypeError, match="model must be a Model, a folder, a Hub id or 'demo', got int"):
        generate(5, "text")
    template, model.tokenizer._template = model.tokenizer._template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            generate(model, CHAT)
    finally:
        model.tokenizer._template = template


def test_a_cache_that_does_not_fit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=2**31 - 1)
    model = pyllama.load(tmp_path, "cpu")
    with pytest.raises(MemoryError, match=r"GiB on cpu"):
        generate(model, [[5]] * 64, max_new_tokens=2**40)
