"""mla_paged_attention against float64 attention whose keys are whole entries and whose values are their first part."""

from collections.abc import Iterator

import pytest
import torch
from comparing import assert_close, attention_of_sequence, bounds, int32, numpy, poisoned, refused, rounded_weights
from test_paged_attention import LENGTHS, paged

from pyllama.ops.mla_paged_attention import mla_paged_attention
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    cache, table = torch.randn(6, 4, 16, dtype=dtype), torch.tensor([[3, 4], [5, -1]], dtype=torch.int32)
    yield torch.randn(3, 4, 16, dtype=dtype), cache, table, int32(0, 2, 3), int32(7, 4), 2, 8, 0.3


def check(lengths: tuple[list[int], list[int]], H: int, rank: int, rope: int, dtype: torch.dtype, device: str) -> None:
    q_lengths, seq_lens = lengths
    S, P, L = 16, 32, rank + rope
    table, cache = paged(seq_lens, P, S), poisoned(P, S, L, dtype=dtype, device=device)
    q = torch.randn(sum(q_lengths), H, L, dtype=dtype, device=device)
    expected = [torch.zeros(0, H, rank, dtype=torch.float64)]
    for q_nHL, pages, length in zip(q.split(q_lengths), table, seq_lens, strict=True):
        entries = torch.randn(length, L, dtype=dtype, device=device)
        for position in range(length):
            cache[pages[position // S], position % S] = entries[position]
        keys = numpy(entries)[:, None]
        expected.append(torch.from_numpy(attention_of_sequence(numpy(q_nHL), keys, keys[..., :rank], 0.07)))
    lens = int32(*seq_lens, device=device)
    longest = max(q_lengths, default=0)
    out = mla_paged_attention(q, cache, table.to(device), bounds(q_lengths, device), lens, longest, rank, 0.07)
    assert out.dtype == dtype
    assert out.is_contiguous()
    rounded = rounded_weights(implementation("mla_paged_attention", device), cache.nan_to_num())
    assert_close(out, torch.cat(expected), rounded_within=rounded)


@pytest.mark.parametrize(("H", "rank", "rope"), [(4, 64, 16), (16, 512, 64)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_formula(
    lengths: tuple[list[int], list[int]], H: int, rank: int, rope: int, dtype: torch.dtype, device: str
) -> None:
    check(lengths, H, rank, rope, dtype, device)


@pytest.mark.parametrize("H", [3, 70])
@pytest.mark.parametrize("lengths", [([1, 1, 0], [230, 100, 0]), ([9, 1], [200, 140])], ids=["decode", "mixed"])
def test_long_caches(lengths: tuple[list[int], list[int]], H: int, dtype: torch.dtype, device: str) -> None:
    """Keys are split among blocks; 70 heads are more rows than a tile has."""
    check(lengths, H, 40, 8, dtype, device)


def test_lengths_beyond_the_block_table() -> None:
    """Only eager bodies read values."""
    q, cache = torch.randn(2, 3, 80), torch.randn(4, 8, 80)
    table = int32(0, 1, 2, 3).view(2, 2)
    for lengths, b in (((17, 1), 0), ((16, 17), 1), ((1, -1), 1), ((2**31 - 1, 1), 0)):
        with refused(rf"mla_paged_attention: seq_lens\[{b}\] is {lengths[b]}, but must be in 0 to 16, .* 2 pages of 8"):
            mla_paged_attention(q, cache, table, bounds([1, 1]), int32(*lengths), 1, 64, 0.1)


def test_arguments(device: str) -> None:
    q, cache = torch.randn(2, 3, 80, device=device), torch.randn(4, 8, 80, device=device)
    table, cu, lens = (
        torch.zeros(2, 1, dtype=torch.int32, device=device),
        bounds([1, 1], device),
        int32(1, 2).to(device),
    )
    with refused("mla_paged_attention: rank is 81.* L = 80"):
        mla_paged_attention(q, cache, table, cu, lens, 1, 81, 0.1)
    with refused(r"mla_paged_attention: kv_cache of shape \[4, 8, 72\] has L = 72, but q has L = 80"):
        mla_paged_attention(q, cache[..., :72], table, cu, lens, 1, 64, 0.1)
