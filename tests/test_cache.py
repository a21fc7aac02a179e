"""Pages and batches: which slot of the cache each token gets."""

from __future__ import annotations

import random

import pytest
import torch

from pyllama.batch import Batch, Packed
from pyllama.cache import PAGE_SIZE, PagedCache, bytes_per_page, free_memory, pages_for
from pyllama.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=32,
    max_positions=512,
    norm_eps=1e-5,
    tie_embeddings=True,
    layers=(
        LayerConfig(GQAConfig(4, 2, 8, rope=None), MLPConfig(16)),
        LayerConfig(GQAConfig(4, 1, 16, rope=None), MLPConfig(16)),
    ),
)


@pytest.mark.parametrize("seed", range(5))
def test_slots_follow_the_block_table(seed: int) -> None:
    rng = random.Random(seed)
    totals = [rng.choice([1, 63, 64, 65, 128, 200]) for _ in range(rng.randint(1, 5))]
    queries = [rng.randint(1, total) for total in totals]
    numbers = rng.sample(range(100), 4 * len(totals))
    block_table = torch.tensor(numbers, dtype=torch.int32).view(len(totals), 4)
    batch = Batch.from_lengths(queries, totals, block_table, PAGE_SIZE)

    positions = [p for q, n in zip(queries, totals, strict=True) for p in range(n - q, n)]
    sequences = [b for b, q in enumerate(queries) for _ in range(q)]
    slots = [
        int(block_table[b, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE
        for b, p in zip(sequences, positions, strict=True)
    ]
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.cu_seqlens.tolist() == [sum(queries[:b]) for b in range(len(queries) + 1)]
    assert batch.seq_lens.tolist() == totals
    assert batch.max_seqlen == max(queries)
    assert {t.dtype for t in (batch.positions, batch.slots, batch.cu_seqlens, batch.seq_lens)} == {torch.int32}

    everything = [
        int(block_table[b, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE for b, n in enumerate(totals) for p in range(n)
    ]
    assert batch.cached.slots.tolist() == everything
    assert batch.cached.cu_seqlens.tolist() == [sum(totals[:b]) for b in range(len(totals) + 1)]
    assert batch.cached.max_seqlen == max(totals)
    assert batch.cached.slots.dtype == batch.cached.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(("query", "total"), [(2, 1), (1, 65), (-1, 3), (0, 3)])
def test_lengths_that_do_not_fit(query: int, total: int) -> None:
    with pytest.raises(ValueError, match="must fit the sequence's 64 cache slots"):
        Batch.from_lengths([query], [total], torch.zeros(1, 1, dtype=torch.int32), PAGE_SIZE)


def test_rectangle() -> None:
    batch = Packed.rectangle(3, 4, torch.device("cpu"))
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3] * 3


def test_pages_are_handed_out_once() -> None:
    cache = PagedCache(CONFIG, num_pages=7, device="cpu", dtype=torch.float32)
    assert [tuple(layer.shape) for layer in cache.layers] == [(7, 2, 2, 64, 8), (7, 2, 1, 64, 16)]
    first, second = cache.allocate(3), cache.allocate(4)
    assert sorted(first + second) == list(range(7))
    with pytest.raises(MemoryError, match="1 cache pages asked for, 0 of 7 are free"):
        cache.allocate(1)
    cache.free(first)
    assert cache.free_pages == 3
    assert sorted(cache.allocate(3)) == sorted(first)


@pytest.mark.parametrize("seed", range(3))
def test_what_came_back_is_handed_out_first(seed: int) -> None:
    """In the order of a stack of all page numbers, the first on top."""
    rng, stack = random.Random(seed), list(reversed(range(50)))
    cache, held = PagedCache(CONFIG, 50, "meta", torch.float32), list[list[int]]()
    for _ in range(200):
        if held and rng.random() < 0.5:
            pages = held.pop(rng.randrange(len(held)))
            cache.free(pages)
            stack.extend(reversed(pages))
        elif (count := rng.randrange(9)) <= len(stack):
            held.append(cache.allocate(count))
            assert held[-1] == [stack.pop() for _ in range(count)]
        assert cache.free_pages == len(stack)


def test_pages_that_nobody_took_cost_nothing() -> None:
    cache = PagedCache(CONFIG, 10**12, "meta", torch.float32)
    assert (cache.allocate(3), cache.free_pages) == ([0, 1, 2], 10**12 - 3)


def test_sizes() -> None:
    assert [pages_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    cache = PagedCache(CONFIG, num_pages=3, device="cpu", dtype=torch.bfloat16)
    assert 3 * bytes_per_page(CONFIG, torch.bfloat16) == sum(layer.nbytes for layer in cache.layers)


def test_a_cache_that_does_not_fit() -> None:
    with pytest.raises(MemoryError, match=r"a cache of 6\d+ tokens needs \d+\.\d\d GiB"):
        PagedCache(CONFIG, num_pages=10**14, device="cpu", dtype=torch.float32)


def test_a_cache_a_little_too_large_is_refused_before_it_is_used() -> None:
    """Linux would hand it out."""
    pages = int(1.1 * free_memory(torch.device("cpu"))) // bytes_per_page(CONFIG, torch.float32)
    with pytest.raises(MemoryError, match="not all free; use fewer sequences"):
        PagedCache(CONFIG, num_pages=pages, device="cpu", dtype=torch.float32)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="negative dimension"):
        PagedCache(CONFIG, num_pages=-1, device="cpu", dtype=torch.float32)
