"""How the next token is chosen: the caller's options, checked, and the tensors that the op `sample` takes.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pyllama.graphs import keep_rows
from pyllama.ops.registry import cast, compute_dtype
from pyllama.ops.sample import sample

_SEEDS = 2**63  # seeds are int64 on the device
_FLOAT32 = torch.finfo(torch.float32)  # and other numbers float32

# What each option may be: its type, a test, and the test in words. NaN passes none of them.
_KINDS: dict[type, str] = {Real: "a number", Integral: "an integer"}
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (Integral, lambda x: x >= 1, "at least 1"),
    "temperature": (Real, lambda x: 0 <= x <= _FLOAT32.max, "at least 0 and finite in float32"),
    "top_k": (Integral, lambda x: x >= 1, "at least 1"),
    "top_p": (Real, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": (Real, lambda x: _FLOAT32.tiny <= x <= _FLOAT32.max, "above 0 and finite in float32"),
    "presence_penalty": (Real, lambda x: -2 <= x <= 2, "between -2 and 2"),
    "frequency_penalty": (Real, lambda x: -2 <= x <= 2, "between -2 and 2"),
    "seed": (Integral, lambda x: 0 <= x < _SEEDS, "at least 0 and below 2**63"),
    "logprobs": (Integral, lambda x: x >= 0, "at least 0"),
    "n": (Integral, lambda x: x >= 1, "at least 1"),
}
_OPTIONAL = ("top_k", "top_p", "min_p", "seed", "logprobs")  # may be None: off


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is made: the options of `generate`, checked.

    Raises TypeError for a value of another type and ValueError for one out of range, with name and value.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy, the likeliest token (the lowest id among equals)
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together reach this probability
    min_p: float | None = None  # only tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: against tokens of prompt and text so far (CTRL's)
    presence_penalty: float = 0.0  # above 0: against tokens of the text so far (OpenAI's)
    frequency_penalty: float = 0.0  # the same, for each time they occurred
    seed: int | None = None  # None: drawn from torch's default generator
    stop: str | Sequence[str] | None = None  # the text ends before the first of these strings
    stop_token_ids: Sequence[int] | None = None  # as EOS tokens, but whatever `ignore_eos` says
    ignore_eos: bool = False
    logprobs: int | None = None  # give each token's logprob, and those of so many of the likeliest
    n: int = 1  # completions of each prompt

    def __post_init__(self) -> None:
        for name, (kind, inside, allowed) in _RULES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{name} must be {_KINDS[kind]}, got {value!r}")
            if not inside(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        for name, element, plural in (("stop", str, "strings"), ("stop_token_ids", Integral, "integers")):
            values = getattr(self, name)
            if values is None or (name == "stop" and isinstance(values, str)):
                continue
            if not is_list(values) or not all(isinstance(v, element) and not isinstance(v, bool) for v in values):
                raise TypeError(f"{name} must be a list of {plural}, got {values!r}")
        if self.stop == "" or "" in self.stop_strings:
            raise ValueError(f"stop must not be or hold the empty string, got {self.stop!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def seeds(self) -> list[int]:
        """Seeds of a prompt's n samples: the seed itself, then ones derived from it (see `derived_seed`).

        Without a seed they are drawn from torch's default generator, so `torch.manual_seed` repeats them.
        """
        if self.seed is not None:
            return [derived_seed(self.seed, i) for i in range(self.n)]
        if self.temperature == 0:
            return [0] * self.n  # no chance involved: leave the generator alone
        seeds: list[int] = torch.randint(_SEEDS - 1, (self.n,), dtype=torch.int64).tolist()
        return seeds


def is_list(value: object) -> bool:
    """Whether it is a collection of things; text and bytes, though sequences to Python, are each one thing."""
    return isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | bytearray | memoryview)


def derived_seed(seed: int, sample: int) -> int:
    """Seed of a prompt's sample number `sample`; sample 0 has the caller's own, so it is what n=1 gives.

    The others are SplitMix64's (Steele et al., OOPSLA 2014) output number `sample` from the state `seed`,
    less the sign bit, so that neighbouring seeds of a caller share no stream.
    """
    if sample == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + sample * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) % _SEEDS


class Sampler:
    """Chooses one token for each sequence of a batch; its state stays on the device, where it is.

    prompts: token ids of each sequence's prompt; seeds: one per sequence. Each sequence has its own random
    stream, so what it gets does not depend on its neighbours.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        batch = len(prompts)

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        self.greedy = params.temperature == 0 and not params.penalized  # the choice is the argmax of logits
        self._state = {
            "temperature": full(params.temperature, torch.float32),
            "top_k": full(min(params.top_k or 0, vocab_size), torch.int32),
            "top_p": full(1.0 if params.top_p is None else params.top_p, torch.float32),
            "min_p": full(params.min_p or 0.0, torch.float32),
            "seed": torch.tensor(seeds, dtype=torch.int64, device=device),
            "step": full(0, torch.int64),
        }
        if params.penalized:
            mask_BV = torch.zeros(batch, vocab_size, dtype=torch.bool)
            for row, prompt in zip(mask_BV, prompts, strict=True):
                row[torch.tensor(prompt)] = True
            self._state |= {
                "repetition_penalty": full(params.repetition_penalty, torch.float32),
                "presence_penalty": full(params.presence_penalty, torch.float32),
                "frequency_penalty": full(params.frequency_penalty, torch.float32),
                "prompt_mask": mask_BV.to(device),
                "counts": torch.zeros(batch, vocab_size, dtype=torch.int32, device=device),
            }

    def choose(self, logits_BV: Tensor) -> Tensor:
        """int64 [B]: the next token of each sequence."""
        if self.greedy:  # what the op gives at temperature 0, without its other work
            return logits_BV.argmax(dim=-1)
        tokens_B: Tensor = sample(logits_BV, **self._state)
        self._state["step"] += 1
        if "counts" in self._state:
            counts_BV = self._state["counts"]
            counts_BV.scatter_add_(1, tokens_B[:, None], torch.ones_like(counts_BV[:, :1]))
        return tokens_B

    def keep(self, rows: Tensor) -> None:
        """Only the sequences `rows` (int64) remain, in this order; one may be there twice."""
        self._state = {name: keep_rows(value, rows) for name, value in self._state.items()}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one new token, from the model's own distribution.

    That is the softmax of the logits, before penalties, temperature and filters.
    """

    token_id: int
    logprob: float
    top: dict[int, float]  # the likeliest tokens, likeliest first


def logprobs_of(logits_BV: Tensor, tokens_B: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """On the device: the chosen tokens' log-probabilities [B]; ids and log-probabilities of the likeliest [B, top]."""
    logprobs_BV = torch.log_softmax(cast(logits_BV, compute_dtype(logits_BV)), dim=-1)
    values_BN, ids_BN = logprobs_BV.topk(top, dim=-1)
    return logprobs_BV.gather(1, tokens_B[:, None])[:, 0], ids_BN, values_BN


def token_logprobs(tokens_B: Tensor, chosen_B: Tensor, ids_BN: Tensor, values_BN: Tensor) -> list[TokenLogprobs]:
    """Of each sequence's chosen token, from what `logprobs_of` gives."""
    rows = zip(tokens_B.tolist(), chosen_B.tolist(), ids_BN.tolist(), values_BN.tolist(), strict=True)
    return [TokenLogprobs(token, logprob, dict(zip(ids, values, strict=True))) for token, logprob, ids, values in rows]
