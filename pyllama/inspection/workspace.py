"""What generating takes beside weights and cache, from `Decoding`'s own passes on tensors without memory.

The passes run on `meta`: every op gives results of the right sizes and computes nothing. An op counts as one kernel,
with what it gives and what its kernel takes meanwhile. Equal layers do the same, so there is one of each kind.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from sys import maxsize
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyllama.batch import Batch, Cached
from pyllama.cache import PAGE_SIZE, PagedCache, page_shape, pages_for
from pyllama.config import ModelConfig
from pyllama.context import PREFILL_TOKENS, CachedContext
from pyllama.graphs import places_for
from pyllama.inspection.allocator import ALLOCATORS, MIB, Allocator, Block, CachingAllocator
from pyllama.loader import empty_model, parameter_dtypes
from pyllama.model import Model
from pyllama.sampling import Sampler, SamplingParams

V = TypeVar("V")
META = torch.device("meta")
SAMPLING = SamplingParams(temperature=1.0)  # takes the logits, which the greedy choice of a step does not need

# What torch gives cuBLAS for a stream, once it multiplies (CublasHandlePool.cpp): on Hopper and Blackwell, and before.
CUBLAS_WORKSPACE, OLDER_CUBLAS_WORKSPACE = 32 * MIB, 8 * MIB + 128 * 1024
PRODUCTS = {f"aten::{name}" for name in ("linear", "matmul", "mm", "addmm", "addmm_", "bmm", "baddbmm")}

# Bytes that a kernel takes beside its results, by its arguments. Those of attention: where there are few blocks, keys
# are split among at most two for each multiprocessor, and each keeps a tile's results and two sums in float32
# (csrc/common/attention_kernels.h, launch_tiles); float32 has a plain kernel. Others: csrc/sample.cu, norm_gate.cu,
# moe_dispatch.cu.
MULTIPROCESSORS = 160  # no GPU has more
DECODE_ROWS = 16  # of a tile: attention_kernels.h, Decode
MLA_ROWS, MLA_VALUES = 64, 512  # mla_paged_attention.cu, Tiles


def _prompts_rows(q: Tensor) -> int:
    """attention_kernels.h, Prefill."""
    return 128 if q.shape[-1] <= 128 else 64


def _parts(q: Tensor, rows: int, values: int) -> int:
    return 0 if q.dtype == torch.float32 else 2 * MULTIPROCESSORS * rows * (values + 2) * 4


def _paged_parts(q: Tensor, kv_cache: Tensor, *rest: Any, **_: Any) -> int:
    longest = rest[3]
    return _parts(q, DECODE_ROWS if longest == 1 else _prompts_rows(q), kv_cache.shape[-1])


INSIDE: dict[str, Callable[..., int]] = {
    "pyllama::attention": lambda q, k, v, *_, **__: _parts(q, _prompts_rows(q), v.shape[-1]),
    "pyllama::paged_attention": _paged_parts,
    "pyllama::decode_attention_": lambda qkv, kv_cache, *_, **__: _parts(qkv, DECODE_ROWS, kv_cache.shape[-1]),
    "pyllama::mla_paged_attention": lambda q, *_, **__: _parts(q, MLA_ROWS, MLA_VALUES),
    "pyllama::norm_gate": lambda x, norm, eps, weight, *_, **__: 4 * len(x) * len(weight),
    "pyllama::moe_dispatch": lambda indices, experts: 4 * experts * -(-indices.numel() // 8192),
    "pyllama::sample": lambda logits, *_, **__: 24 * len(logits) * -(-logits.shape[1] // 256),
}


def cublas_workspace(device: torch.device | None) -> int:
    """Bytes. device: a GPU that is here; None: any, so the most."""
    older = device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return OLDER_CUBLAS_WORKSPACE if older else CUBLAS_WORKSPACE


class Recorded(TorchDispatchMode):
    """Takes of an allocator what the tensors made inside take, and gives it back when they go.

    kernels: also what kernels take while they run. cublas: bytes that the first product takes, and all share.
    """

    def __init__(self, allocator: Allocator, kernels: bool, cublas: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allocator, self._kernels, self._cublas = allocator, kernels, cublas
        self.workspace: Block | None = None  # cuBLAS's
        self._known: set[int] = set()  # storages that are there, of ours and of others

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._know(storage)  # what was not made here
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if self._know(storage):
                weakref.finalize(storage, self._allocator.give_back, self._allocator.take(storage.nbytes()))
        if self._cublas and self.workspace is None and function.name().partition(".")[0] in PRODUCTS:
            self.workspace = self._allocator.take(self._cublas)
        if self._kernels and (inside := INSIDE.get(function.name())):
            self._allocator.give_back(self._allocator.take(inside(*args, **(kwargs or {}))))
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


def one_of_each(config: ModelConfig) -> ModelConfig:
    """The model with one layer of each kind."""
    return replace(config, layers=tuple(dict.fromkeys(config.layers)))


def of_all_layers(config: ModelConfig, of_each: Mapping[str, V]) -> dict[str, V]:
    """What each parameter of the model has, by name, from what those of `one_of_each` have."""
    kinds = {layer: str(kind) for kind, layer in enumerate(dict.fromkeys(config.layers))}
    inside: dict[str, list[tuple[str, V]]] = {}
    for name, value in of_each.items():
        if name.startswith("layers."):
            _, kind, rest = name.split(".", 2)
            inside.setdefault(kind, []).append((rest, value))
    found: dict[str, V] = {}
    for name, value in of_each.items():
        if not name.startswith("layers."):
            found[name] = value
        elif name not in found:  # the first of them
            for i, layer in enumerate(config.layers):
                found |= {f"layers.{i}.{rest}": value for rest, value in inside[kinds[layer]]}
    return found


class Use:
    """What a model takes of a device, loaded and generating. device: "cuda" or "cpu"; staged: bytes that loading takes
    beside the weights; cublas: what cuBLAS takes for a stream of a GPU."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: str,
        staged: int = 0,
        cublas: int = CUBLAS_WORKSPACE,
    ) -> None:
        self._config = one_of_each(config)
        self._left_out = Counter(config.layers) - Counter(self._config.layers)
        self._dtype, self._on_gpu, self._cublas = dtype, device == "cuda", cublas
        self._model = empty_model(self._config, maxsize)  # which has fewer layers than the model that is there
        weights = _weights(self._model, dtype)
        self._model.load_state_dict(weights, assign=True)
        self.weights = list(of_all_layers(config, {name: weight.nbytes for name, weight in weights.items()}).values())
        self._loaded = ALLOCATORS[device]()
        for size in self.weights:
            self._loaded.take(size)
        if staged:
            self._loaded.give_back(self._loaded.take(staged))
        self.generating = cache(self._generating)

    def loaded(self) -> int:
        """Bytes, with what loading took."""
        return self._loaded.total.most

    @torch.inference_mode()
    def _generating(self, batch: int, context: int) -> int:
        """Bytes, at most, for `batch` sequences of `context` tokens in the end, all but one of them their prompts'.

        On a GPU the prompts' passes and a first step leave what they took to torch's allocator. Before a step is
        captured, cuBLAS's workspace and whatever else is free go back to the device, and the capture has memory of its
        own.
        """
        allocator, prompt = self._loaded.copy(), context - 1
        self._make_tables(pages_for(prompt))
        for _, table in self._model._tables.values():
            allocator.take(table.nbytes)
        places = places_for(batch) if self._on_gpu else batch
        pages = PagedCache(self._config, min(batch, PREFILL_TOKENS) * pages_for(prompt), META, self._dtype)
        with Recorded(allocator, self._on_gpu, self._cublas if self._on_gpu else 0) as recorded:
            sequences = _Sequences(self._model, [range(prompt)] * batch, [1] * batch, 1, places, loads=False)
            for layer, count in self._left_out.items():
                size = torch.Size((batch * pages_for(prompt), *page_shape(layer.attention))).numel()
                for _ in range(count):
                    allocator.take(size * self._dtype.itemsize)
            sampler = Sampler(SAMPLING, [()] * places, [0] * places, self._config.vocab_size, META)
            tokens_B = torch.empty(places, dtype=torch.int64, device=META)
            tokens_B.copy_(sampler.choose(self._prefill(batch, places, prompt, pages)))
            sampler.choose(sequences.extend(tokens_B))
        if self._on_gpu:
            # `Graphs` makes the handle of cuBLAS, and with it the workspace, then takes the workspace away.
            allocator.give_back(recorded.workspace or allocator.take(self._cublas))
            allocator.release_free()
            with Recorded(CachingAllocator(allocator.total), True, self._cublas):
                sampler.choose(sequences.extend(tokens_B))
        return allocator.total.most

    def _make_tables(self, pages: int) -> None:
        """RoPE's, as the first pass does, on the host: on the device is what comes of it."""
        self._model._tables.clear()
        batch = _pass([1], [1], pages)
        with META:
            for rope in self._model._ropes:
                self._model._rotation(rope, batch)

    def _prefill(self, batch: int, places: int, prompt: int, cache: PagedCache) -> Tensor:
        """Logits [B, V], as `CachedContext.prefill` makes them, the last pass being the largest of all."""
        counts: list[int] = []
        while len(counts) < batch and sum(counts) < PREFILL_TOKENS:
            counts.append(min(prompt, PREFILL_TOKENS - sum(counts)))
        tokens_T = torch.empty(sum(counts), dtype=torch.int64, device=META)
        before = torch.empty(batch - len(counts), self._config.vocab_size, dtype=self._dtype, device=META)
        last = self._model.run(tokens_T, _pass(counts, [prompt] * len(counts), pages_for(prompt)), cache)
        logits = torch.cat((before, last[list(range(len(counts)))]))
        return logits.index_select(0, torch.arange(places, device=META))


def _weights(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `load` makes them, without memory."""
    dtypes = parameter_dtypes(model, dtype)
    return {n: torch.empty_like(parameter, dtype=dtypes[n]) for n, parameter in model.named_parameters()}


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


class _Sequences(CachedContext):
    """With a block table of which only the size is there: of long contexts the rows alone would fill the memory."""

    def _block_table(self, slots: Sequence[int], shared: Sequence[int], places: int) -> Tensor:
        return _integers(places, pages_for(max(slots)))


@dataclass(frozen=True)
class _Pass(Batch):
    ends: Sequence[int] = field(kw_only=True)  # `seq_lens`, which cannot be read

    @cached_property
    def cached(self) -> Cached:
        return Cached(_integers(sum(self.ends)), _integers(len(self.ends) + 1), max(self.ends))


def _pass(counts: Sequence[int], ends: Sequence[int], pages: int) -> Batch:
    """As `Batch.from_lengths` makes it, without memory."""
    batch, tokens = len(counts), sum(counts)
    return _Pass(
        cu_seqlens=_integers(batch + 1),
        positions=_integers(tokens),
        lengths=_integers(tokens),
        max_seqlen=max(counts),
        max_positions=pages * PAGE_SIZE,
        seq_lens=_integers(batch),
        block_table=_integers(batch, pages),
        slots=_integers(tokens),
        page_size=PAGE_SIZE,
        ends=ends,
    )
