"""One step of decoding: the device's side of `generate`.

`Decoding` holds the sequences of one call. Between steps their state (last tokens, lengths, cache, random
streams) stays on the device in a fixed set of tensors, updated in place; the host gets the new tokens.

B sequences (each prompt times its samples), T tokens of a pass, V vocabulary, S page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.model import Model
from pyllama.ops.advance import advance_
from pyllama.sampling import Sampler, SamplingParams, TokenLogprobs, token_logprobs

PREFILL_TOKENS = 2048  # of one pass: bounds the memory of activations, whatever the prompts' length


class Decoding:
    """The sequences of one call: n for each prompt, in order.

    prompts: token ids, none empty; max_new_tokens: of each prompt, at least 1; use_cache=False computes every
    sequence from its beginning at each step. Raises MemoryError when the cache does not fit.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        params: SamplingParams,
        use_cache: bool = True,
    ) -> None:
        context = CachedContext if use_cache else WholeContext
        self._context: Context = context(model, prompts, max_new_tokens, params.n)
        rows = [prompt for prompt in prompts for _ in range(params.n)]
        seeds = [seed for _ in prompts for seed in params.seeds()]
        self._sampler = Sampler(params, rows, seeds, model.config.vocab_size, model.device)
        self._logprobs = params.logprobs
        self._tokens_B: Tensor | None = None

    @torch.inference_mode()
    def step(self) -> list[tuple[int, TokenLogprobs | None]]:
        """The next token of every sequence, with its log-probabilities where asked for.

        The first step computes the prompts.
        """
        if self._tokens_B is None:
            logits_BV = self._context.prefill()
        else:
            logits_BV = self._context.extend(self._tokens_B)
        self._tokens_B = self._sampler.choose(logits_BV)
        tokens = self._tokens_B.tolist()
        if self._logprobs is None:
            return [(token, None) for token in tokens]
        return list(zip(tokens, token_logprobs(logits_BV, self._tokens_B, self._logprobs), strict=True))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Only the sequences `rows` go on, in this order; the others leave without disturbing them."""
        assert self._tokens_B is not None
        index = torch.tensor(rows, device=self._tokens_B.device)
        self._tokens_B = self._tokens_B[index]
        self._sampler.keep(index)
        self._context.keep(index)


class Context(Protocol):
    """What the sequences consist of so far."""

    def prefill(self) -> Tensor:
        """Logits [B, V] after each prompt."""
        ...

    def extend(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token (int64) of each sequence."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only the sequences `rows` (int64) remain."""
        ...


class CachedContext:
    """Sequences in a paged cache, so that a step computes new tokens only.

    A prompt is computed once for its n samples: they share its full pages, and each has a copy of the last,
    partly filled one. All pages are taken at the start, since the length of every sequence is bounded.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], n: int) -> None:
        self._model = model
        self._prompts = prompts
        self._n = n
        # The last token is never computed, only given out: it needs no place.
        slots = [len(prompt) + new - 1 for prompt, new in zip(prompts, max_new_tokens, strict=True)]
        shared = [len(prompt) // PAGE_SIZE for prompt in prompts]
        pages = sum(full + n * (pages_for(s) - full) for s, full in zip(slots, shared, strict=True))
        self._cache = PagedCache(model.config, pages, model.device, model.dtype)
        width = pages_for(max(slots))
        table = []
        for s, full in zip(slots, shared, strict=True):
            prefix = self._cache.allocate(full)
            for _ in range(n):
                row = prefix + self._cache.allocate(pages_for(s) - full)
                table.append(row + [0] * (width - len(row)))  # never read: beyond the sequence
        self._block_table = torch.tensor(table, dtype=torch.int32, device=model.device)
        lengths = [len(prompt) for prompt in prompts for _ in range(n)]
        self._batch = self._decoding_batch(torch.tensor(lengths, dtype=torch.int32, device=model.device))
        # Past this length RoPE changes for all of a sequence's tokens. Only then are the tokens so far needed.
        self._switch = model.config.rope_switch
        self._texts = [list(prompt) for prompt in prompts for _ in range(n)] if self._switch else []

    def prefill(self) -> Tensor:
        lengths = [len(prompt) for prompt in self._prompts]
        logits = self._compute(self._prompts, self._block_table[:: self._n], lengths)
        self._copy_last_pages()
        return logits.repeat_interleave(self._n, dim=0)

    def extend(self, tokens_B: Tensor) -> Tensor:
        if self._switch is not None:
            self._rotate_anew(self._switch, tokens_B)
        batch = self._batch
        advance_(batch.positions, batch.seq_lens, batch.slots, batch.block_table, PAGE_SIZE)
        return self._model.run(tokens_B, batch, self._cache)

    def keep(self, rows: Tensor) -> None:
        self._block_table = self._block_table[rows]
        self._batch = self._decoding_batch(self._batch.seq_lens[rows])
        if self._switch is not None:
            self._texts = [self._texts[row] for row in rows.tolist()]

    def _compute(self, texts: Sequence[Sequence[int]], block_table: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits [B, V] after each text, whose keys and values go into the cache; it is to be `lengths` long."""
        logits = []
        for segments in _passes([len(text) for text in texts], PREFILL_TOKENS):
            rows, starts, ends = zip(*segments, strict=True)
            tokens_T = [token for b, start, end in segments for token in texts[b][start:end]]
            counts = [end - start for start, end in zip(starts, ends, strict=True)]
            whole = [lengths[b] for b in rows]
            batch = Batch.from_lengths(counts, ends, block_table[list(rows)], PAGE_SIZE, whole)
            last = self._model.run(torch.tensor(tokens_T, device=self._model.device), batch, self._cache)
            complete = [i for i, (b, _, end) in enumerate(segments) if end == len(texts[b])]
            logits.append(last[complete])
        return torch.cat(logits)

    def _rotate_anew(self, switch: int, tokens_B: Tensor) -> None:
        """Computes those sequences again which, with one more token, exceed the length up to which their keys hold."""
        crossing = [b for b, text in enumerate(self._texts) if len(text) == switch]
        if crossing:
            texts = [self._texts[b] for b in crossing]
            self._compute(texts, self._block_table[crossing], [switch + 1] * len(texts))
        for text, token in zip(self._texts, tokens_B.tolist(), strict=True):
            text.append(token)

    def _decoding_batch(self, seq_lens_B: Tensor) -> Batch:
        """One new token of each sequence; `extend` sets where, step by step, in place."""
        return Batch(
            cu_seqlens=torch.arange(len(seq_lens_B) + 1, dtype=torch.int32, device=seq_lens_B.device),
            positions=torch.empty_like(seq_lens_B),
            lengths=seq_lens_B,
            max_seqlen=1,
            max_positions=self._block_table.shape[1] * PAGE_SIZE,
            seq_lens=seq_lens_B,
            block_table=self._block_table,
            slots=torch.empty_like(seq_lens_B),
            page_size=PAGE_SIZE,
        )

    def _copy_last_pages(self) -> None:
        """Gives each prompt's second and later samples what the first has on its last, partly filled page."""
        partial = [i for i, prompt in enumerate(self._prompts) if len(prompt) % PAGE_SIZE]
        if self._n == 1 or not partial:
            return
        rows = torch.tensor([[i * self._n + sample for sample in range(self._n)] for i in partial])
        last = torch.tensor([[len(self._prompts[i]) // PAGE_SIZE] for i in partial])
        pages = self._block_table[rows, last].long()  # [partial prompts, n]
        sources = pages[:, :1].expand(-1, self._n - 1).flatten()
        for layer in self._cache.layers:
            layer[pages[:, 1:].flatten()] = layer[sources]


class WholeContext:
    """Sequences without a cache, each computed from its beginning at every step."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], n: int) -> None:
        self._model = model
        self._tokens = [torch.tensor(prompt, device=model.device) for prompt in prompts for _ in range(n)]

    def prefill(self) -> Tensor:
        return torch.stack([self._model(tokens_T[None])[0, -1] for tokens_T in self._tokens])

    def extend(self, tokens_B: Tensor) -> Tensor:
        self._tokens = [torch.cat(pair) for pair in zip(self._tokens, tokens_B[:, None], strict=True)]
        return self.prefill()

    def keep(self, rows: Tensor) -> None:
        self._tokens = [self._tokens[row] for row in rows.tolist()]


def _passes(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts sequences of `lengths` tokens into passes of at most `most`: (sequence, start, end), in order."""
    segments: list[tuple[int, int, int]] = []
    room = most
    for b, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            segments.append((b, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield segments
                segments, room = [], most
    if segments:
        yield segments
