"""What generating takes beside weights and cache, from `Decoding`'s own passes on tensors without memory.

The passes run on `meta`: every op gives results of the right sizes and computes nothing. An op counts as one kernel,
with what it gives and what its kernel takes meanwhile. Equal layers do the same, so there is one of each kind.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from sys import maxsize
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyllama.batch import Batch, Cached
from pyllama.cache import PAGE_SIZE, PagedCache, page_shape, pages_for
from pyllama.context import PREFILL_TOKENS, CachedContext
from pyllama.inspection.allocator import ALLOCATORS, Allocator
from pyllama.loader import empty_model, parameter_dtypes
from pyllama.model import Model
from pyllama.sampling import Sampler, SamplingParams

META = torch.device("meta")
SAMPLING = SamplingParams(temperature=1.0)  # takes the logits, which the greedy choice of a step does not need

# What torch gives cuBLAS on Hopper and Blackwell (CUDAContextLight.cpp: 32 MiB, elsewhere 8): for the passes as they
# are, and for the captured step.
CUBLAS_WORKSPACES = 2 * 2**25

# Bytes that a kernel takes beside its results, by its arguments (csrc/common/attention_kernels.h: where there are few
# blocks, keys are split among at most two for each multiprocessor, of which each keeps a tile's result and two sums in
# float32; csrc/sample.cu, norm_gate.cu, moe_dispatch.cu).
MULTIPROCESSORS = 160  # no GPU has more
TILE_ROWS = 128  # no tile has more


def _split(values: int) -> int:
    return 2 * MULTIPROCESSORS * TILE_ROWS * (values + 2) * 4


INSIDE: dict[str, Callable[..., int]] = {
    "pyllama::attention": lambda q, k, v, *_, **__: _split(v.shape[-1]),
    "pyllama::paged_attention": lambda q, kv_cache, *_, **__: _split(kv_cache.shape[-1]),
    "pyllama::decode_attention_": lambda qkv, kv_cache, *_, **__: _split(kv_cache.shape[-1]),
    "pyllama::mla_paged_attention": lambda q, kv_cache, *_, **__: _split(kv_cache.shape[-1]),
    "pyllama::norm_gate": lambda x, norm, eps, weight, *_, **__: 4 * len(x) * len(weight),
    "pyllama::moe_dispatch": lambda indices, experts: 4 * experts * -(-indices.numel() // 8192),
    "pyllama::sample": lambda logits, *_, **__: 24 * len(logits) * -(-logits.shape[1] // 256),
}


class Recorded(TorchDispatchMode):
    """Takes of allocators, of each, what the tensors made inside take, and gives it back when they go.

    kernels: also what kernels take while they run.
    """

    def __init__(self, allocators: Sequence[Allocator], kernels: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocators, self._kernels = allocators, kernels
        self._known: set[int] = set()  # storages that are there, of ours and of others

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._know(storage)  # what was not made here
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if self._know(storage):
                for allocator in self._allocators:
                    weakref.finalize(storage, allocator.give_back, allocator.take(storage.nbytes()))
        if self._kernels and (inside := INSIDE.get(function.name())):
            for allocator in self._allocators:
                allocator.give_back(allocator.take(inside(*args, **(kwargs or {}))))
        return result

    def _know(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is new."""
        key = storage._cdata
        if key in self._known:
            return False
        self._known.add(key)
        weakref.finalize(storage, self._known.discard, key)
        return True


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [storage for storage in found if storage.device == META]


class Use:
    """What a model takes of a device, loaded and generating. device: "cuda" or "cpu"; staged: bytes that loading takes
    beside the weights."""

    def __init__(self, model: Model, dtype: torch.dtype, device: str, staged: int = 0) -> None:
        config = model.config
        self._layers = config.layers
        self._config = replace(config, layers=tuple(dict.fromkeys(config.layers)))
        self._dtype, self._device, self._staged = dtype, device, staged
        self.weights = [weight.nbytes for weight in _weights(model, dtype).values()]
        self._model = empty_model(self._config, maxsize)  # which has fewer layers than the model that is there
        self._model.load_state_dict(_weights(self._model, dtype), assign=True)
        self.generating = cache(self._generating)

    def loaded(self) -> int:
        """Bytes, with what loading took."""
        return self._allocator_with_weights().taken

    def _allocator_with_weights(self) -> Allocator:
        allocator = ALLOCATORS[self._device]()
        for size in self.weights:
            allocator.take(size)
        if self._staged:
            allocator.give_back(allocator.take(self._staged))
        return allocator

    @torch.inference_mode()
    def _generating(self, batch: int, context: int) -> int:
        """Bytes, at most, for `batch` sequences of `context` tokens in the end, nearly all of them their prompts'.

        On a GPU the prompts' passes and a first step leave what they took to torch's allocator, and the captured step
        has memory of its own.
        """
        allocator, captured = self._allocator_with_weights(), ALLOCATORS[self._device]()
        prompt = max(context - 1, 1)
        self._make_tables(pages_for(prompt))
        for _, table in self._model._tables.values():
            allocator.take(table.nbytes)
        on_gpu = self._device == "cuda"
        pages = PagedCache(self._config, min(batch, PREFILL_TOKENS) * pages_for(prompt), META, self._dtype)
        with Recorded([allocator], on_gpu):
            sequences = CachedContext(self._model, [range(prompt)] * batch, [1] * batch, 1, batch, loads=False)
            for layer in (Counter(self._layers) - Counter(self._config.layers)).elements():  # those left out
                shape = batch * pages_for(prompt), *page_shape(layer.attention)
                allocator.take(torch.Size(shape).numel() * self._dtype.itemsize)
            sampler = Sampler(SAMPLING, [()] * batch, [0] * batch, self._config.vocab_size, META)
            tokens_B = torch.empty(batch, dtype=torch.int64, device=META)
            tokens_B.copy_(sampler.choose(self._prefill(batch, prompt, pages)))
        with Recorded([allocator, captured], on_gpu):
            logits_BV = sequences.extend(tokens_B)
            sampler.choose(logits_BV)
        return allocator.taken + (captured.taken + CUBLAS_WORKSPACES if on_gpu else 0)

    def _make_tables(self, pages: int) -> None:
        """RoPE's, as the first pass does, on the host: on the device is what comes of it."""
        self._model._tables.clear()
        batch = _pass([1], [1], pages)
        with META:
            for rope in self._model._ropes:
                self._model._rotation(rope, batch)

    def _prefill(self, batch: int, prompt: int, cache: PagedCache) -> Tensor:
        """Logits [B, V], as `CachedContext.prefill` makes them, the last pass being the largest of all."""
        counts: list[int] = []
        while len(counts) < batch and sum(counts) < PREFILL_TOKENS:
            counts.append(min(prompt, PREFILL_TOKENS - sum(counts)))
        tokens_T = torch.empty(sum(counts), dtype=torch.int64, device=META)
        before = torch.empty(batch - len(counts), self._config.vocab_size, dtype=self._dtype, device=META)
        last = self._model.run(tokens_T, _pass(counts, [prompt] * len(counts), pages_for(prompt)), cache)
        logits = torch.cat((before, last[list(range(len(counts)))]))
        return logits.index_select(0, torch.arange(batch, device=META))


def _weights(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `load` makes them, without memory."""
    dtypes = parameter_dtypes(model, dtype)
    return {n: torch.empty_like(parameter, dtype=dtypes[n]) for n, parameter in model.named_parameters()}


def _pass(counts: Sequence[int], ends: Sequence[int], pages: int) -> Batch:
    """On `meta`, as `Batch.from_lengths` makes it, but for `cached`, which would read lengths there."""
    block_table = torch.zeros(len(counts), pages, dtype=torch.int32)
    batch = Batch.from_lengths(counts, ends, block_table, PAGE_SIZE)
    there: dict[str, Any] = {name: value.to(META) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    slots_M, cu_seqlens_B, longest = batch.cached
    moved = replace(batch, **there)
    vars(moved)["cached"] = Cached(slots_M.to(META), cu_seqlens_B.to(META), longest)
    return moved
