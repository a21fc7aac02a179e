"""paged_attention against float64 attention over each sequence's own keys, gathered from the pages one by one.

Whatever no sequence owns is poisoned: the rest of the last page, other pages, and entries of the block table.
"""

from collections.abc import Iterator

import pytest
import torch
from comparing import assert_close, attention_of_sequence, bounds, int32, numpy, poisoned, refused, rounded_weights
from conftest import Implementation
from torch import Tensor

from pyllama.ops.paged_attention import paged_attention


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    cache, table = torch.randn(6, 2, 2, 4, 4, dtype=dtype), torch.tensor([[3, 4], [5, -1]], dtype=torch.int32)
    yield torch.randn(3, 4, 4, dtype=dtype), cache, table, int32(0, 2, 3), int32(7, 4), 2
    yield torch.randn(2, 4, 4, dtype=dtype), cache, table, int32(0, 1, 2), int32(6, 1), 1, 0.3, 3
    if dtype != torch.float64:  # of which finite differences would take long: kernels have no smaller heads
        cache, table = torch.randn(2, 2, 1, 4, 32, dtype=dtype), int32(1, 0).view(1, 2)
        yield torch.randn(2, 2, 32, dtype=dtype), cache, table, int32(0, 2), int32(6), 2


def paged(lengths: list[int], P: int, S: int, unused: int = -1) -> Tensor:
    """A block table of distinct pages in random order, with one spare column."""
    counts = [-(-length // S) for length in lengths]
    pages, table = torch.randperm(P).tolist(), torch.full((len(lengths), max(counts, default=0) + 1), unused)
    for b, count in enumerate(counts):
        table[b, :count] = torch.tensor([pages.pop() for _ in range(count)])
    return table.int()


# New tokens and tokens in the cache, theirs included.
LENGTHS = {
    "decode": ([1, 1, 1], [1, 40, 17]),
    "prefill": ([33, 16], [33, 16]),
    "mixed": ([1, 20, 7], [50, 20, 30]),
    "padding": ([1, 1, 0], [8, 0, 0]),
    "none": ([], []),
}


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_formula(
    lengths: tuple[list[int], list[int]], H: int, G: int, window: int | None, dtype: torch.dtype, chosen: Implementation
) -> None:
    q_lengths, seq_lens = lengths
    K, S, P, device = 64, 16, 16, chosen.device
    table, cache = paged(seq_lens, P, S), poisoned(P, 2, G, S, K, dtype=dtype, device=device)
    q = torch.randn(sum(q_lengths), H + 2, K, dtype=dtype, device=device)[:, :H]  # a strided view
    expected, largest = [], 0.0
    for q_nHK, pages, length in zip(q.split(q_lengths), table, seq_lens, strict=True):
        kv = torch.randn(2, length, G, K, dtype=dtype, device=device)
        for position in range(length):
            cache[pages[position // S], :, :, position % S] = kv[:, position]
        expected.append(attention_of_sequence(numpy(q_nHK), *numpy(kv), K**-0.5, window))
        largest = max(largest, rounded_weights(chosen.name, kv[1]))
    out = paged_attention(
        q,
        cache,
        table.to(device),
        bounds(q_lengths, device),
        int32(*seq_lens, device=device),
        max(q_lengths, default=0),
        window=window,
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(
        out,
        torch.cat([torch.zeros(0, H, K, dtype=torch.float64), *map(torch.from_numpy, expected)]),
        rounded_within=largest,
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_heads_of_long_caches(n: int, K: int, dtype: torch.dtype, chosen: Implementation) -> None:
    """So many blocks that keys are not split: each goes through many stretches of keys."""
    G, S, P, device, seq_lens = 6, 64, 20, chosen.device, [600, n, 331]
    table, cache = paged(seq_lens, P, S), poisoned(P, 2, G, S, K, dtype=dtype, device=device)
    q = torch.randn(3 * n, G, K, dtype=dtype, device=device)
    expected, largest = [], 0.0
    for q_nHK, pages, length in zip(q.split(n), table, seq_lens, strict=True):
        kv = torch.randn(2, length, G, K, dtype=dtype, device=device)
        for i in range(0, length, S):
            tokens = kv[:, i : i + S]
            cache[pages[i // S], :, :, : tokens.shape[1]] = tokens.transpose(1, 2)
        expected.append(torch.from_numpy(attention_of_sequence(numpy(q_nHK), *numpy(kv), K**-0.5)))
        largest = max(largest, rounded_weights(chosen.name, kv[1]))
    cu, lens = bounds([n] * 3, device), int32(*seq_lens, device=device)
    out = paged_attention(q, cache, table.to(device), cu, lens, n)
    assert_close(out, torch.cat(expected), rounded_within=largest)


@pytest.mark.parametrize(("n", "H"), [(1, 4), (1, 20), (3, 4)])
@pytest.mark.parametrize("K", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_cache_and_scale(n: int, H: int, K: int, dtype: torch.dtype, chosen: Implementation) -> None:
    """The last n tokens; keys are split among blocks. 20 heads are more rows than a tile of the decoding kernel has."""
    S, P, length, device = 64, 12, 600, chosen.device
    table, cache = paged([length], P, S), poisoned(P, 2, 1, S, K, dtype=dtype, device=device)
    kv, q = torch.randn(2, length, 1, K, dtype=dtype, device=device), torch.randn(n, H, K, dtype=dtype, device=device)
    for i in range(table.shape[1] - 1):
        tokens = kv[:, i * S : (i + 1) * S]
        cache[table[0, i], :, :, : tokens.shape[1]] = tokens.transpose(1, 2)
    cu, lens = bounds([n], device), int32(length, device=device)
    for window in (None, 300):
        out = paged_attention(q, cache, table.to(device), cu, lens, n, scale=0.3, window=window)
        expected = attention_of_sequence(numpy(q), *numpy(kv), 0.3, window)
        assert_close(out, expected, rounded_within=rounded_weights(chosen.name, kv[1]))


def test_lengths_beyond_the_block_table() -> None:
    """Only eager bodies read values."""
    q, cache = torch.randn(2, 2, 64), torch.randn(4, 2, 2, 8, 64)
    table = int32(0, 1, 2, 3).view(2, 2)
    for lengths, b in (((17, 1), 0), ((16, 17), 1), ((1, -1), 1), ((2**31 - 1, 1), 0)):
        with refused(rf"paged_attention: seq_lens\[{b}\] is {lengths[b]}, but must be in 0 to 16, .* 2 pages of 8"):
            paged_attention(q, cache, table, bounds([1, 1]), int32(*lengths), 1)


def test_arguments(device: str) -> None:
    q, cache = torch.randn(2, 3, 64, device=device), torch.randn(4, 2, 2, 8, 64, device=device)
    table, cu, lens = (
        torch.zeros(2, 1, dtype=torch.int32, device=device),
        bounds([1, 1], device),
        int32(1, 2).to(device),
    )
    with refused("paged_attention: q has H = 3 heads.* G = 2"):
        paged_attention(q, cache, table, cu, lens, 1)
    q = q[:, :2]
    with refused("paged_attention: window is -1"):
        paged_attention(q, cache, table, cu, lens, 1, window=-1)
    with refused(r"paged_attention: kv_cache of shape \[4, 2, 2, 8, 32\] has K = 32, but q has K = 64"):
        paged_attention(q, cache[..., :32], table, cu, lens, 1)
    with refused(r"paged_attention: seq_lens of shape \[1\] has B = 1, but block_table has B = 2"):
        paged_attention(q, cache, table, cu, lens[:1], 1)
    with refused("paged_attention: block_table must have .*int32"):
        paged_attention(q, cache, table.long(), cu, lens, 1)
