"""One step of decoding: the device's side of `generate`.

`Decoding` holds the sequences of one call. Their state (last tokens, lengths, cache, random streams) stays on the
device in a fixed set of tensors, updated in place. So a step needs nothing of the host, and the host may read what a
step gave while the next one runs.

B places of the batch, for the sequences (each prompt times its samples) and, where there are graphs, a few that nobody
uses; T tokens of a pass, V vocabulary, S page size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.config import GQAConfig
from pyllama.graphs import Graphs, Runner, directly, keep_rows, places_for
from pyllama.model import Model
from pyllama.ops.advance import advance_
from pyllama.ops.registry import OPS, implementation
from pyllama.sampling import Sampler, SamplingParams, TokenLogprobs, logprobs_of, token_logprobs

PREFILL_TOKENS = 2048  # of one pass: bounds the memory of activations, whatever the prompts' length


class Decoding:
    """The sequences of one call: n for each prompt, numbered in order.

    prompts: token ids, none empty; max_new_tokens: of each prompt, at least 1; use_cache=False computes every
    sequence from its beginning at each step. ahead: how many steps are begun before the oldest one's tokens are read;
    None: 1 on a GPU, which is then never idle, and 0 on the CPU. graphs: whether steps are replayed as CUDA graphs;
    None: where every op has a kernel (eager bodies read values on the host). Neither changes what is computed.
    Raises MemoryError when the cache does not fit, and ValueError for graphs on a CPU or without a cache.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        params: SamplingParams,
        use_cache: bool = True,
        ahead: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        self._device = model.device
        self._on_gpu = self._device.type == "cuda"
        if graphs is None:
            graphs = use_cache and self._on_gpu and all(implementation(op, self._device) == "cuda" for op in OPS)
        if graphs and not use_cache:
            raise ValueError("graphs need a cache: without one each step has another shape; use graphs=False")
        self._graphs = graphs
        self._run: Runner = Graphs(self._device) if graphs else directly
        self._ahead = int(self._on_gpu) if ahead is None else ahead
        # Past this length RoPE changes for all of a sequence's tokens: then they are needed on the host, but the last.
        self._switch = model.config.rope_switch if use_cache else None
        if self._switch is not None:
            self._ahead = min(self._ahead, 1)

        # With what was read since, where it is needed.
        self._texts = [list(prompt) for prompt in prompts for _ in range(params.n)]
        self._rooms = [room for room in max_new_tokens for _ in range(params.n)]
        self._stopped: set[int] = set()
        self._steps = 0  # begun so far
        self._in_flight: deque[_InFlight] = deque()
        self._batch = list(range(len(self._texts)))  # which sequence is in each place; the places after them are unused
        rows = self._filled(self._batch)
        context = CachedContext if use_cache else WholeContext
        self._context: Context = context(model, prompts, max_new_tokens, params.n, len(rows))
        seeds = [seed for _ in prompts for seed in params.seeds()]
        texts, seeds = [self._texts[row] for row in rows], [seeds[row] for row in rows]
        self._sampler = Sampler(params, texts, seeds, model.config.vocab_size, self._device)
        self._logprobs = params.logprobs
        self._tokens_B = torch.empty(len(rows), dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def step(self) -> dict[int, tuple[int, TokenLogprobs | None]]:
        """The next token of every sequence that has not ended, with its log-probabilities where asked for.

        A sequence has ended when it was stopped or has its `max_new_tokens`; there must be one that has not. The first
        step computes the prompts.
        """
        while len(self._in_flight) <= self._ahead and (going_on := self._going_on()):
            self._begin(going_on)
        new = {sequence: entry for sequence, entry in self._in_flight.popleft().read() if sequence not in self._stopped}
        if self._switch is not None:
            for sequence, (token, _) in new.items():
                self._texts[sequence].append(token)
        return new

    def stop(self, sequences: Collection[int]) -> None:
        """These sequences have ended; the others go on undisturbed. What was begun for them is thrown away."""
        self._stopped.update(sequences)

    def _going_on(self) -> list[int]:
        """The places of sequences that need another step, as far as is known."""
        return [
            place
            for place, sequence in enumerate(self._batch)
            if self._steps < self._rooms[sequence] and sequence not in self._stopped
        ]

    def _begin(self, places: list[int]) -> None:
        """Begins a step of the sequences in these places."""
        if len(places) < len(self._batch):
            self._keep(places)
        if self._steps == 0:
            logits_BV = self._context.prefill()
            results = self._choose(logits_BV)
        else:
            self._rotate_anew()
            results = self._next()
        # Copies, as the next step writes where these are; from a GPU to pinned memory, and nobody waits for them here.
        results = tuple(result.to("cpu", non_blocking=True, copy=True) for result in results)
        ready = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._in_flight.append(_InFlight(self._batch, results, ready))
        self._steps += 1

    def _next(self) -> tuple[Tensor, ...]:
        """What `_choose` gives, for the sequences with one more token."""
        if self._sampler.greedy and self._logprobs is None:
            self._run("greedy", partial(self._context.extend_greedily, self._tokens_B))
            return (self._tokens_B,)
        logits_BV = self._run("forward", partial(self._context.extend, self._tokens_B))
        return self._run("sampling", partial(self._choose, logits_BV))

    def _choose(self, logits_BV: Tensor) -> tuple[Tensor, ...]:
        """The next tokens [B], also put where the next pass reads them, and what `logprobs_of` gives, if wanted."""
        chosen_B = self._sampler.choose(logits_BV)
        self._tokens_B.copy_(chosen_B)
        return (chosen_B,) if self._logprobs is None else (chosen_B, *logprobs_of(logits_BV, chosen_B, self._logprobs))

    def _keep(self, places: list[int]) -> None:
        """Only the sequences in these places go on, in the first places; nobody waits for the device."""
        filled = self._filled(places)
        on_host = torch.tensor(filled, pin_memory=self._on_gpu)
        rows = on_host.to(self._device, non_blocking=True)
        if self._graphs and len(filled) < len(self._tokens_B):
            self._run = Graphs(self._device)  # for so many places; the old ones go, as a batch never grows
        self._batch = [self._batch[place] for place in places]
        self._tokens_B = keep_rows(self._tokens_B, rows)
        self._sampler.keep(rows)
        self._context.keep(rows, len(places))

    def _filled(self, rows: list[int]) -> list[int]:
        """A row for every place of a batch of these: in those that nobody uses, the last one's again."""
        places = places_for(len(rows)) if self._graphs else len(rows)
        return rows + rows[-1:] * (places - len(rows))

    def _rotate_anew(self) -> None:
        """Computes those sequences again which, with one more token, exceed the length up to which their keys hold."""
        if self._switch is None:
            return
        unread = len(self._in_flight) - 1  # in the cache beside what was read: all in flight, but for the last token
        crossing = [
            place for place, sequence in enumerate(self._batch) if len(self._texts[sequence]) + unread == self._switch
        ]
        if crossing:
            self._context.compute_again(
                crossing, [self._texts[self._batch[place]][: self._switch] for place in crossing]
            )


class _InFlight(NamedTuple):
    """A step that was begun: whose it is, and what it gives, which is on the host when it is `ready`."""

    sequences: list[int]
    results: tuple[Tensor, ...]  # tokens, int64 [B], and what `logprobs_of` gives; those of unused places come last
    ready: torch.cuda.Event | None  # None: at once

    def read(self) -> Iterator[tuple[int, tuple[int, TokenLogprobs | None]]]:
        """Each sequence with its token and log-probabilities; waits for this step alone."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens_B, *logprobs = self.results
        tokens: list[int] = tokens_B.tolist()
        entries = token_logprobs(tokens_B, *logprobs) if logprobs else [None] * len(tokens)
        return zip(self.sequences, zip(tokens, entries, strict=True), strict=False)


class Context(Protocol):
    """What the sequences consist of so far."""

    def prefill(self) -> Tensor:
        """Logits [B, V] after each prompt, for every place of the batch."""
        ...

    def extend(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token (int64) of each sequence."""
        ...

    def extend_greedily(self, tokens_B: Tensor) -> None:
        """Replaces each sequence's token by the likeliest next one, in place."""
        ...

    def compute_again(self, places: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Computes these sequences once more, for their next token's sake."""
        ...

    def keep(self, rows: Tensor, used: int) -> None:
        """Only the sequences `rows` (int64) remain, in this order, of which the first `used` count."""
        ...


class CachedContext:
    """Sequences in a paged cache, so that a step computes new tokens only.

    A prompt is computed once for its n samples: they share its full pages, and each has a copy of the last,
    partly filled one. All pages are taken at the start, since the length of every sequence is bounded.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], n: int, places: int
    ) -> None:
        self._model = model
        self._weights = [parameter.detach() for parameter in model.parameters()]  # as a graph reads them
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
        table += [[0] * width] * (places - len(table))
        lengths = [len(prompt) for prompt in prompts for _ in range(n)]
        lengths += [0] * (places - len(lengths))  # so they stay, see `advance_`
        seq_lens_B = torch.tensor(lengths, dtype=torch.int32, device=model.device)
        grouped = [layer.attention for layer in model.config.layers if isinstance(layer.attention, GQAConfig)]
        kv_heads = max((attention.num_kv_heads for attention in grouped), default=1)
        # One new token of each sequence; `extend` sets where, step by step, in place.
        self._batch = Batch(
            cu_seqlens=torch.arange(places + 1, dtype=torch.int32, device=model.device),
            positions=torch.empty_like(seq_lens_B),
            lengths=seq_lens_B,
            max_seqlen=1,
            max_positions=width * PAGE_SIZE,
            seq_lens=seq_lens_B,
            block_table=torch.tensor(table, dtype=torch.int32, device=model.device),
            slots=torch.empty_like(seq_lens_B),
            page_size=PAGE_SIZE,
            counters=torch.zeros(places * max(kv_heads, 3), dtype=torch.int32, device=model.device),
        )

    def prefill(self) -> Tensor:
        first = self._batch.block_table[: len(self._prompts) * self._n : self._n]
        logits = self._compute(self._prompts, first, [len(prompt) for prompt in self._prompts])
        self._copy_last_pages()
        prompt_B = torch.arange(len(self._batch.seq_lens), device=logits.device).div_(self._n, rounding_mode="floor")
        return logits.index_select(0, prompt_B.clamp_(max=len(logits) - 1))

    def extend(self, tokens_B: Tensor) -> Tensor:
        logits_BV = self._model.run(tokens_B, self._advanced(), self._cache)
        self._hold_tables()
        return logits_BV

    def extend_greedily(self, tokens_B: Tensor) -> None:
        self._model.run_greedily(tokens_B, self._advanced(), self._cache)
        self._hold_tables()

    def _advanced(self) -> Batch:
        """The batch, with one more token of each sequence."""
        batch = self._batch
        advance_(batch.positions, batch.seq_lens, batch.slots, batch.block_table, PAGE_SIZE)
        return batch

    def _hold_tables(self) -> None:
        self._rope_tables = self._model._tables.copy()  # a graph reads them, when the model may have longer ones

    def compute_again(self, places: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        self._compute(texts, self._batch.block_table[list(places)], [len(text) + 1 for text in texts])

    def keep(self, rows: Tensor, used: int) -> None:
        batch, places = self._batch, len(rows)
        seq_lens_B = keep_rows(batch.seq_lens, rows)
        seq_lens_B[used:] = 0
        self._batch = replace(
            batch,
            cu_seqlens=batch.cu_seqlens[: places + 1],
            positions=batch.positions[:places],
            lengths=seq_lens_B,
            seq_lens=seq_lens_B,
            block_table=keep_rows(batch.block_table, rows),
            slots=batch.slots[:places],
        )

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

    def _copy_last_pages(self) -> None:
        """Gives each prompt's second and later samples what the first has on its last, partly filled page."""
        partial = [i for i, prompt in enumerate(self._prompts) if len(prompt) % PAGE_SIZE]
        if self._n == 1 or not partial:
            return
        rows = torch.tensor([[i * self._n + sample for sample in range(self._n)] for i in partial])
        last = torch.tensor([[len(self._prompts[i]) // PAGE_SIZE] for i in partial])
        pages = self._batch.block_table[rows, last].long()  # [partial prompts, n]
        sources = pages[:, :1].expand(-1, self._n - 1).flatten()
        for layer in self._cache.layers:
            layer[pages[:, 1:].flatten()] = layer[sources]


class WholeContext:
    """Sequences without a cache, each computed from its beginning at every step."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], n: int, places: int
    ) -> None:
        self._model = model
        self._tokens = [torch.tensor(prompt, device=model.device) for prompt in prompts for _ in range(n)]

    def prefill(self) -> Tensor:
        return torch.stack([self._model(tokens_T[None])[0, -1] for tokens_T in self._tokens])

    def extend(self, tokens_B: Tensor) -> Tensor:
        self._tokens = [torch.cat(pair) for pair in zip(self._tokens, tokens_B[:, None], strict=True)]
        return self.prefill()

    def extend_greedily(self, tokens_B: Tensor) -> None:
        tokens_B.copy_(self.extend(tokens_B).argmax(dim=-1))

    def compute_again(self, places: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Nothing: every step does."""

    def keep(self, rows: Tensor, used: int) -> None:
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
