"""What the sequences of one call consist of so far, in a cache or without one.

B places of the batch, for the sequences (each prompt times its samples) and, where there are graphs, a few that nobody
uses; T tokens of a pass, V vocabulary, S page size, M layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pyllama.balance import new_loads
from pyllama.batch import Batch
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.config import GQAConfig
from pyllama.graphs import keep_rows
from pyllama.model import Model
from pyllama.ops.advance import advance_

PREFILL_TOKENS = 2048  # of one pass: bounds the memory of activations, whatever the prompts' length


class Context(Protocol):
    """What the sequences consist of so far."""

    loads: Tensor | None  # int64 [M, B, E], how many of their tokens went to each expert; None: nobody counts

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
        """Computes these sequences once more, for their next token's sake; loads are then those of this time."""
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
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        n: int,
        places: int,
        loads: bool,
    ) -> None:
        self._model = model
        self.loads = new_loads(model.config, len(prompts), model.device) if loads else None  # of prompts, at first
        self._weights = [parameter.detach() for parameter in model.parameters()]  # as a graph reads them
        self._prompts = prompts
        self._n = n
        # The last token is never computed, only given out: it needs no place.
        slots = [len(prompt) + new - 1 for prompt, new in zip(prompts, max_new_tokens, strict=True)]
        shared = [len(prompt) // PAGE_SIZE for prompt in prompts]
        pages = sum(full + n * (pages_for(s) - full) for s, full in zip(slots, shared, strict=True))
        self._cache = PagedCache(model.config, pages, model.device, model.dtype)
        block_table_BP = self._block_table(slots, shared, places)
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
            max_positions=block_table_BP.shape[1] * PAGE_SIZE,
            seq_lens=seq_lens_B,
            block_table=block_table_BP,
            slots=torch.empty_like(seq_lens_B),
            page_size=PAGE_SIZE,
            counters=torch.zeros(places * max(kv_heads, 3), dtype=torch.int32, device=model.device),
        )

    def _block_table(self, slots: Sequence[int], shared: Sequence[int], places: int) -> Tensor:
        """int32 [B, pages], the pages of each place, which are taken here: for so many tokens of each prompt's samples,
        the first `shared` pages being all samples'."""
        width = pages_for(max(slots))
        table = []
        for s, full in zip(slots, shared, strict=True):
            prefix = self._cache.allocate(full)
            for _ in range(self._n):
                row = prefix + self._cache.allocate(pages_for(s) - full)
                table.append(row + [0] * (width - len(row)))  # never read: beyond the sequence
        table += [[0] * width] * (places - len(table))
        return torch.tensor(table, dtype=torch.int32, device=self._model.device)

    def prefill(self) -> Tensor:
        first = self._batch.block_table[: len(self._prompts) * self._n : self._n]
        logits = self._compute(self._prompts, first, [len(prompt) for prompt in self._prompts], self.loads)
        self._copy_last_pages()
        prompt_B = torch.arange(len(self._batch.seq_lens), device=logits.device).div_(self._n, rounding_mode="floor")
        prompt_B.clamp_(max=len(logits) - 1)
        if self.loads is not None:
            self.loads = self.loads.index_select(1, prompt_B)
        return logits.index_select(0, prompt_B)

    def extend(self, tokens_B: Tensor) -> Tensor:
        logits_BV = self._model.run(tokens_B, self._advanced(), self._cache, self.loads)
        self._hold_tables()
        return logits_BV

    def extend_greedily(self, tokens_B: Tensor) -> None:
        self._model.run_greedily(tokens_B, self._advanced(), self._cache, self.loads)
        self._hold_tables()

    def _advanced(self) -> Batch:
        """The batch, with one more token of each sequence."""
        batch = self._batch
        advance_(batch.positions, batch.seq_lens, batch.slots, batch.block_table, PAGE_SIZE)
        return batch

    def _hold_tables(self) -> None:
        self._rope_tables = self._model._tables.copy()  # a graph reads them, when the model may have longer ones

    def compute_again(self, places: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        loads = None if self.loads is None else torch.zeros_like(self.loads[:, list(places)])
        self._compute(texts, self._batch.block_table[list(places)], [len(text) + 1 for text in texts], loads)
        if self.loads is not None and loads is not None:
            self.loads[:, list(places)] = loads

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
        if self.loads is not None:
            self.loads = keep_rows(self.loads, rows, dim=1)

    def _compute(
        self, texts: Sequence[Sequence[int]], block_table: Tensor, lengths: Sequence[int], loads: Tensor | None
    ) -> Tensor:
        """Logits [B, V] after each text, whose keys and values go into the cache; it is to be `lengths` long."""
        logits = []
        for segments in _passes([len(text) for text in texts], PREFILL_TOKENS):
            rows, starts, ends = zip(*segments, strict=True)
            tokens_T = [token for b, start, end in segments for token in texts[b][start:end]]
            counts = [end - start for start, end in zip(starts, ends, strict=True)]
            whole = [lengths[b] for b in rows]
            batch = Batch.from_lengths(counts, ends, block_table[list(rows)], PAGE_SIZE, whole)
            theirs = None if loads is None else loads[:, rows[0] : rows[-1] + 1]  # of neighbours, see `_passes`
            last = self._model.run(torch.tensor(tokens_T, device=self._model.device), batch, self._cache, theirs)
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
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        n: int,
        places: int,
        loads: bool,
    ) -> None:
        self._model = model
        self._tokens = [torch.tensor(prompt, device=model.device) for prompt in prompts for _ in range(n)]
        self.loads = new_loads(model.config, len(self._tokens), model.device) if loads else None

    def prefill(self) -> Tensor:
        theirs = [None] * len(self._tokens) if self.loads is None else self.loads.zero_().split(1, dim=1)
        pairs = zip(self._tokens, theirs, strict=True)
        return torch.stack([self._model(tokens_T[None], loads=loads)[0, -1] for tokens_T, loads in pairs])

    def extend(self, tokens_B: Tensor) -> Tensor:
        self._tokens = [torch.cat(pair) for pair in zip(self._tokens, tokens_B[:, None], strict=True)]
        return self.prefill()

    def extend_greedily(self, tokens_B: Tensor) -> None:
        tokens_B.copy_(self.extend(tokens_B).argmax(dim=-1))

    def compute_again(self, places: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Nothing: every step does."""

    def keep(self, rows: Tensor, used: int) -> None:
        self._tokens = [self._tokens[row] for row in rows.tolist()]
        if self.loads is not None:
            self.loads = keep_rows(self.loads, rows, dim=1)


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
