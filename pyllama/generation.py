"""`generate` and `stream`: prompts in, text out."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from torch import Tensor

from pyllama.balance import new_loads
from pyllama.loader import load
from pyllama.model import Model
from pyllama.sampling import SamplingParams, TokenLogprobs, is_list
from pyllama.step import Decoding, NewToken
from pyllama.text import Chunk, Completion, FinishReason, TextStream
from pyllama.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or a chat's messages


def generate(
    model: Model | str | Path,
    prompt: Prompt | Sequence[Prompt],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    n: int = 1,
    use_cache: bool = True,
    routing: bool = False,
) -> Any:
    """Continues prompts, and gives the new text only.

    model: a `Model`, or what `pyllama.load` takes. A source is loaded again by every call: load it once and
        pass the model.
    prompt: text, token ids, or chat messages ([{"role": "user", "content": "..."}, ...], written out by the
        checkpoint's chat template) gives a `Completion`. A list of these gives a list, computed as one batch,
        each as it would be alone. With n > 1, each prompt gives a list of n.
    max_new_tokens: how many at most. The end of the context ends a completion too ("length").
    temperature: 0 takes the likeliest token (greedy); above 0 tokens are drawn, more evenly the higher it is.
    top_k, top_p, min_p: draw only from the k likeliest tokens; from the likeliest that together reach
        probability top_p; from those at least min_p times as likely as the likeliest. None: from all.
    repetition_penalty, presence_penalty, frequency_penalty: make tokens that occurred less likely, see
        `SamplingParams`. 1, 0 and 0: off.
    seed: makes what is drawn repeat. Each prompt of a batch draws as it would alone with this seed; the first
        of n samples draws as with n=1, the others with seeds derived from it (`sampling.derived_seed`).
    stop: the text ends before the first of these strings; `token_ids` keeps the tokens it was found in. A
        special token of the checkpoint, spelled as a string, is this token.
    stop_token_ids: tokens that end the text as EOS does. ignore_eos: do not end at EOS.
    logprobs: k gives each new token's log-probability and the k likeliest tokens.
    use_cache: False computes the whole sequence again for every token: the same tokens, more slowly.
    routing: counts how many tokens the routers sent to each expert, `Completion.expert_load`.

    Raises TypeError for an unknown option or a value of a wrong type; ValueError for a value out of range, an
    empty prompt, one that fills the context, a token id outside the vocabulary, text or messages when the
    checkpoint has no tokenizer or chat template, and routing of a model without experts; MemoryError when the
    cache does not fit.
    """
    chunks, single = _start(**locals())  # locals: the arguments, as they came
    last = sorted((chunk for chunk in chunks if chunk.completion), key=lambda chunk: (chunk.index, chunk.sample))
    flat = [chunk.completion for chunk in last]
    results = flat if n == 1 else [flat[i : i + n] for i in range(0, len(flat), n)]
    return results[0] if single else results


def stream(
    model: Model | str | Path,
    prompt: Prompt | Sequence[Prompt],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    n: int = 1,
    use_cache: bool = True,
    routing: bool = False,
) -> Iterator[Chunk]:
    """`generate`, piece by piece: the same arguments and errors, and text as soon as it is certain.

    Yields a `Chunk` for every new token of every sequence. `chunk.index` says of which prompt it is,
    `chunk.sample` of which of its n samples; the last of a sequence has its `Completion`. Arguments are
    checked at the call, before the first chunk is asked for. Leaving the loop early frees everything.
    """
    return _start(**locals())[0]


def _start(
    model: Model | str | Path, prompt: Any, use_cache: bool, routing: bool, **options: Any
) -> tuple[Iterator[Chunk], bool]:
    """Checks the arguments of `generate`; the chunks to come, and whether `prompt` is a single one."""
    params = SamplingParams(**options)
    for name, value in (("use_cache", use_cache), ("routing", routing)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if isinstance(model, str | Path):
        model = load(model)
    if not isinstance(model, Model):
        raise TypeError(f"model must be a Model, a folder, a Hub id or 'demo', got {type(model).__name__}")
    if routing:
        new_loads(model.config, device="meta")  # or say why not now
    single = _is_single(prompt)
    named = [("prompt", prompt)] if single else [(f"prompt {i}", one) for i, one in enumerate(prompt)]
    prompts = [_token_ids(model, one, name) for name, one in named]
    vocab_size = model.config.vocab_size
    if params.logprobs is not None and params.logprobs > vocab_size:
        raise ValueError(f"logprobs must be at most the {vocab_size} tokens there are, got {params.logprobs}")
    return _chunks(model, prompts, params, _stop_ids(model, params), use_cache, routing), single


def _is_single(prompt: object, name: str = "prompt") -> bool:
    """Whether it is one prompt and not a list of them."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) or not is_list(prompt):
        raise TypeError(
            f"{name} must be text, a list of token ids, a list of chat messages, or a list of such prompts, "
            f"got {type(prompt).__name__}: {reprlib.repr(prompt)}"
        )
    if not prompt:
        raise ValueError(f"{name} is empty: it has 0 tokens, and at least 1 is needed")
    return isinstance(prompt[0], Integral | Mapping)


def _token_ids(model: Model, prompt: Any, name: str) -> list[int]:
    """One prompt as token ids, checked; `name` names it in errors."""
    if not _is_single(prompt, name):
        raise TypeError(f"{name} must be text, token ids or chat messages, got {prompt!r}")
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        prompt = _encoded(model.tokenizer, prompt, name)
    vocab_size, context = model.config.vocab_size, model.config.max_positions
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"{name} must hold token ids only, got {token!r} at place {place}")
        _check_token(f"{name} has token id {token} at place {place}", int(token), vocab_size)
    if len(prompt) >= context:
        raise ValueError(
            f"{name} has {len(prompt)} tokens; the context holds {context}, new ones included, so a prompt "
            f"may have at most {context - 1}"
        )
    return [int(token) for token in prompt]


def _encoded(tokenizer: Tokenizer | None, prompt: Any, name: str) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            f"{name} is text, but the checkpoint has no tokenizer.json; give a list of token ids, or put the "
            "tokenizer.json of the same model in Hugging Face's layout beside the weights (tokenizer.model is not read)"
        )
    if prompt == "":
        raise ValueError(f"{name} is empty; to begin from nothing give a list with the id of a first token")
    if not isinstance(prompt, str):
        return tokenizer.encode_chat(prompt)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"{name} {prompt!r} has 0 tokens, and at least 1 is needed")
    return ids


def _check_token(what: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"{what}; the vocabulary is 0 to {vocab_size - 1}")


def _stop_ids(model: Model, params: SamplingParams) -> set[int]:
    """The tokens that end a completion: EOS, the caller's, and special tokens that the caller spelled."""
    tokenizer, ids = model.tokenizer, set(params.stop_token_ids or ())
    for token in ids:
        _check_token(f"stop_token_ids has {token}", token, model.config.vocab_size)
    if params.stop_strings and tokenizer is None:
        raise ValueError("stop needs text, but the checkpoint has no tokenizer.json; use stop_token_ids")
    if tokenizer is not None:
        named = [tokenizer.special_id(string) for string in params.stop_strings]
        ids |= {token for token in named if token is not None}
    return ids if params.ignore_eos else ids | model.eos_token_ids


@dataclass
class _Sequence:
    """One completion in the making, on the host."""

    index: int
    sample: int
    prompt_tokens: int
    room: int  # for so many new tokens
    text_stream: TextStream
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_seconds: float = 0.0

    def accept(self, token: NewToken, stop: bool, seconds: float) -> Chunk:
        """Takes the next token, which came `seconds` after the start; stop: it ends the text."""
        self.token_ids.append(token.id)
        if len(self.token_ids) == 1:
            self.prompt_seconds = seconds
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        full = len(self.token_ids) == self.room
        text = "" if stop else self.text_stream.push(token.id)
        if stop or full:
            text += self.text_stream.finish()
        stopped = stop or self.text_stream.stopped
        reason: FinishReason | None = "stop" if stopped else "length" if full else None
        self.text.append(text)
        return Chunk(
            text=text,
            token_ids=[token.id],
            finish_reason=reason,
            index=self.index,
            sample=self.sample,
            logprobs=None if token.logprobs is None else [token.logprobs],
            completion=None if reason is None else self._completion(reason, token.loads, seconds),
        )

    def _completion(self, reason: FinishReason, loads: Tensor | None, seconds: float) -> Completion:
        return Completion(
            text="".join(self.text),
            token_ids=self.token_ids,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            prompt_seconds=self.prompt_seconds,
            generation_seconds=seconds - self.prompt_seconds,
            logprobs=self.logprobs or None,
            expert_load=None if loads is None else tuple(map(tuple, loads.tolist())),
        )


def _chunks(
    model: Model,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    stop_ids: set[int],
    use_cache: bool,
    routing: bool,
) -> Iterator[Chunk]:
    """Decodes until every sequence has ended. Nothing outlives the generator."""
    start = perf_counter()
    rooms = [min(params.max_new_tokens, model.config.max_positions - len(prompt)) for prompt in prompts]
    sequences = [
        _Sequence(index, sample, len(prompt), room, TextStream(model.tokenizer, params.stop_strings))
        for index, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
        for sample in range(params.n)
    ]
    decoding = Decoding(model, prompts, rooms, params, use_cache, loads=routing)
    going_on = len(sequences)
    while going_on:
        new = decoding.step()
        seconds = perf_counter() - start
        chunks = {
            number: sequences[number].accept(token, token.id in stop_ids, seconds) for number, token in new.items()
        }
        ended = [number for number, chunk in chunks.items() if chunk.finish_reason is not None]
        decoding.stop(ended)
        going_on -= len(ended)
        yield from chunks.values()
