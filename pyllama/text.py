"""From tokens to text as they come: characters that span tokens, stop strings, and what a caller gets back.

The text of a completion is the tokenizer's decoding of the new tokens before the stop. Streamed, it is the
same text in pieces: a piece is given out once no later token can change it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pyllama.sampling import TokenLogprobs
from pyllama.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt; `str()` is the text.

    In a batch the seconds of one sequence include the work done for the others beside it.
    """

    text: str  # without special tokens, and ends before the stop; "" when the checkpoint has no tokenizer
    token_ids: list[int]  # every new token, the one that stopped it included
    finish_reason: FinishReason  # "stop": an EOS token or a stop of the caller's; "length": no room for more
    prompt_tokens: int
    prompt_seconds: float  # until the first new token
    generation_seconds: float  # from the first new token to the last
    logprobs: list[TokenLogprobs] | None = None  # of each of token_ids, when asked for
    # For each layer with experts, how many tokens each of them got, when asked for: all of the prompt's, and the new
    # ones but the last, which no layer has seen.
    expert_load: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds

    @property
    def generation_tokens_per_second(self) -> float | None:
        """Tokens after the first, each a step of its own; None when there was only one."""
        return (len(self.token_ids) - 1) / self.generation_seconds if len(self.token_ids) > 1 else None


@dataclass(frozen=True)
class Chunk:
    """One step of one sequence; the chunks of a sequence add up to its `Completion`."""

    text: str  # "" while a character or a possible stop string is incomplete
    token_ids: list[int]
    finish_reason: FinishReason | None  # None until the last chunk
    index: int  # of the prompt in the list of prompts
    sample: int  # which of the prompt's n samples
    logprobs: list[TokenLogprobs] | None = None
    completion: Completion | None = None  # the whole, on the last chunk


class TextStream:
    """Text of one sequence: `push` each token, `finish` after the last; each returns the text now certain.

    `stopped` becomes true when a stop string is complete; nothing of it, and nothing after it, is given out.
    Where several match, the first to be complete counts (then the longest), however the tokens cut the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._detokenizer = detokenizer(tokenizer)
        self._stop = stop
        self._held = ""  # the longest end of the text so far with which a stop string may begin

    def push(self, token_id: int) -> str:
        return self._match(self._detokenizer.push(token_id))

    def finish(self) -> str:
        text = self._match(self._detokenizer.finish())
        held, self._held = self._held, ""
        return text + held

    def _match(self, new: str) -> str:
        if self.stopped or not new or not self._stop:
            return "" if self.stopped else new
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self._stop)) - 1)
        hold = next((k for k in range(longest, 0, -1) if text.endswith(_prefixes(self._stop, k))), 0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _prefixes(strings: Sequence[str], length: int) -> tuple[str, ...]:
    return tuple(string[:length] for string in strings if len(string) > length)


class Detokenizer(Protocol):
    """Text of a growing sequence. What the calls return adds up to `Tokenizer.decode` of all tokens."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


def detokenizer(tokenizer: Tokenizer | None) -> Detokenizer:
    """The incremental form of `tokenizer.decode`; without a tokenizer the text is empty."""
    if tokenizer is None:
        return _NoText()
    decoder = tokenizer.backend.decoder
    stages = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while len(stages) == 1 and stages[0]["type"] == "Sequence":
        stages = stages[0]["decoders"]
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return _ByteLevel(tokenizer)
    return _Pieces(tokenizer)


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: themselves where printable in Latin-1, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class _ByteLevel:
    """Byte-level BPE (GPT-2, Llama 3): a token is bytes, and the text is the UTF-8 of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._tokenizer.piece(token_id)
        try:
            return self._utf8.decode(bytes(map(_BYTE_OF.__getitem__, token)))
        except KeyError:  # an added token, written as it is
            return self._utf8.decode(token.encode())

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Any other decoder, SentencePiece's above all: the library decodes each piece after the one before it.

    The piece before is there because a decoder treats the first one specially (it drops its leading space).
    Tokens that are parts of characters wait for the next whole token: what a run of them means is only known
    at its end, since one bad byte makes every byte of the run U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._run: list[int] = []

    def push(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id)
        if not piece:
            return ""
        self._run.append(token_id)
        partial = piece.startswith("<0x") or "\ufffd" in self._tokenizer.decode([token_id])
        return "" if partial else self.finish()

    def finish(self) -> str:
        before, run = self._before, self._run
        text = self._tokenizer.decode(before + run)[len(self._tokenizer.decode(before)) :]
        self._before, self._run = run, []
        return text
