"""One step of decoding: the device's side of `generate`.

`Decoding` holds the sequences of one call. Their state (last tokens, lengths, cache, random streams) stays on the
device in a fixed set of tensors, updated in place. So a step needs nothing of the host, and the host may read what a
step gave while the next one runs.

B places of the batch, for the sequences (each prompt times its samples) and, where there are graphs, a few that nobody
uses; V vocabulary, M layers with experts, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyllama.context import CachedContext, Context, WholeContext
from pyllama.graphs import Graphs, Runner, directly, keep_rows, places_for
from pyllama.model import Model
from pyllama.ops.registry import OPS, implementation
from pyllama.sampling import Sampler, SamplingParams, TokenLogprobs, logprobs_of, token_logprobs


class Decoding:
    """The sequences of one call: n for each prompt, numbered in order.

    prompts: token ids, none empty; max_new_tokens: of each prompt, at least 1; use_cache=False computes every
    sequence from its beginning at each step. ahead: how many steps are begun before the oldest one's tokens are read;
    None: 1 on a GPU, which is then never idle, and 0 on the CPU. graphs: whether steps are replayed as CUDA graphs;
    None: where every op has a kernel (eager bodies read values on the host). Neither changes what is computed.
    loads: whether the experts' loads are counted. Raises MemoryError when the cache does not fit, and ValueError for
    graphs on a CPU or without a cache, and for loads of a model without experts.
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
        loads: bool = False,
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
        self._context: Context = context(model, prompts, max_new_tokens, params.n, len(rows), loads)
        seeds = [seed for _ in prompts for seed in params.seeds()]
        texts, seeds = [self._texts[row] for row in rows], [seeds[row] for row in rows]
        self._sampler = Sampler(params, texts, seeds, model.config.vocab_size, self._device)
        self._logprobs = params.logprobs
        self._tokens_B = torch.empty(len(rows), dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def step(self) -> dict[int, NewToken]:
        """The next token of every sequence that has not ended.

        A sequence has ended when it was stopped or has its `max_new_tokens`; there must be one that has not. The first
        step computes the prompts.
        """
        while len(self._in_flight) <= self._ahead and (going_on := self._going_on()):
            self._begin(going_on)
        new = {sequence: token for sequence, token in self._in_flight.popleft().read() if sequence not in self._stopped}
        if self._switch is not None:
            for sequence, token in new.items():
                self._texts[sequence].append(token.id)
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
        results = tuple(map(_copied, results))
        loads = None if self._context.loads is None else _copied(self._context.loads)
        ready = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        self._in_flight.append(_InFlight(self._batch, results, loads, ready))
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


class NewToken(NamedTuple):
    """What a step gives a sequence."""

    id: int
    logprobs: TokenLogprobs | None
    loads: Tensor | None  # int64 [M, E], how many of the tokens before this one went to each expert


class _InFlight(NamedTuple):
    """A step that was begun: whose it is, and what it gives, which is on the host when it is `ready`.

    What belongs to unused places comes last.
    """

    sequences: list[int]
    results: tuple[Tensor, ...]  # tokens, int64 [B], and what `logprobs_of` gives
    loads: Tensor | None  # of the experts, [M, B, E], as they were when it ended
    ready: torch.cuda.Event | None  # None: at once

    def read(self) -> Iterator[tuple[int, NewToken]]:
        """Each sequence with its token; waits for this step alone."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens_B, *logprobs = self.results
        nothing = [None] * len(tokens_B)
        entries = token_logprobs(tokens_B, *logprobs) if logprobs else nothing
        loads = nothing if self.loads is None else self.loads.unbind(1)
        return zip(self.sequences, map(NewToken, tokens_B.tolist(), entries, loads), strict=False)


def _copied(result: Tensor) -> Tensor:
    """On the host, as the next step writes where the result is; from a GPU in pinned memory, and nobody waits for it
    here."""
    return result.to("cpu", non_blocking=True, copy=True)
