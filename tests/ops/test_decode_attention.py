"""decode_attention_ in float64: heads turned one by one, then attention over each sequence's own keys.

Whatever no sequence owns is poisoned: the rest of the last page, other pages, and entries of the block table.
"""

from collections.abc import Iterator

import pytest
import torch
from comparing import assert_close, attention_of_sequence, int32, numpy, poisoned, refused, refused_by_kernels
from conftest import Implementation
from test_norm_rope_store import prepared
from test_paged_attention import paged
from test_rope import table

from pyllama.ops.decode_attention import decode_attention_


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    K = 32
    cache, pages = torch.randn(6, 2, 2, 4, K, dtype=dtype), torch.tensor([[3, 4], [5, -1], [0, 1]], dtype=torch.int32)
    qkv, seq_lens = torch.randn(3, 8 * K, dtype=dtype), int32(7, 4, 1)
    yield qkv, cache, pages, seq_lens, int32(6, 3, 0)
    counters, weight = torch.zeros(12, dtype=torch.int32), torch.randn(K, dtype=dtype)
    yield qkv, cache, pages, seq_lens, int32(9, 3, 0), table(20, 16), weight, weight, 1e-5, True, 3, counters


def check(
    lengths: list[int],
    H: int,
    G: int,
    K: int,
    R: int | None,
    dtype: torch.dtype,
    device: str,
    norm: bool = False,
    interleaved: bool = False,
    window: int | None = None,
) -> None:
    S, B = 16, len(lengths)
    P = sum(-(-length // S) for length in lengths) + 2
    qkv = torch.randn(B, (H + 2 * G) * K + 32, dtype=dtype, device=device)[:, 16:-16]  # rows lie apart
    pages, cache = paged(lengths, P, S), poisoned(P, 2, G, S, K, dtype=dtype, device=device)
    positions = torch.randint(100, (B,), dtype=torch.int32, device=device)
    cos_sin = None if R is None else table(100, R).to(device)
    weights = tuple(torch.randn(2, K, dtype=dtype, device=device)) if norm else (None, None)
    heads = qkv.unflatten(1, (H + 2 * G, K)).clone()
    q = torch.from_numpy(prepared(heads[:, :H], weights[0], cos_sin, positions, interleaved))
    k = torch.from_numpy(prepared(heads[:, H : H + G], weights[1], cos_sin, positions, interleaved))
    v = heads[:, H + G :]
    expected = torch.zeros(B, H, K, dtype=torch.float64)
    for b, length in enumerate(lengths):
        kv = torch.randn(2, length, G, K, dtype=dtype, device=device)
        for position in range(length - 1):
            cache[pages[b, position // S], :, :, position % S] = kv[:, position]
        if length:
            kv = kv.double()
            kv[0, -1], kv[1, -1] = k[b].to(dtype), v[b]
            # Queries and keys are rounded before they meet.
            rounded = q[b].to(dtype).double()
            expected[b] = torch.from_numpy(attention_of_sequence(numpy(rounded[None]), *numpy(kv), K**-0.5, window))[0]
    before, counters = cache.clone(), torch.zeros(B * G + 1, dtype=torch.int32, device=device)
    decode_attention_(
        qkv, cache, pages.to(device), int32(*lengths, device=device), positions, cos_sin, *weights, 1e-5, interleaved,
        window, counters,
    )  # fmt: skip
    assert not counters.any()
    # A query or key may be rounded to the neighbour of float64's, and tensor cores take weights in the values' type.
    slack = 8 * v.abs().max().item() if B and dtype.itemsize == 2 else 0.0
    assert_close(qkv[:, : H * K].unflatten(1, (H, K)), expected, rounded_within=slack)
    for b, length in enumerate(lengths):
        if length:
            page, place = pages[b, (length - 1) // S], (length - 1) % S
            assert_close(cache[page, 0, :, place], k[b])
            assert torch.equal(cache[page, 1, :, place], v[b])
            before[page, :, :, place] = cache[page, :, :, place]
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)  # nothing else was written


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (16, 1)])
@pytest.mark.parametrize("lengths", [[1], [1, 40, 17], [8, 0, 0], [16, 64, 65, 300], []], ids=str)
def test_formula(lengths: list[int], H: int, G: int, window: int | None, dtype: torch.dtype, device: str) -> None:
    check(lengths, H, G, 64, 64, dtype, device, window=window)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("H", "G", "K", "R"), [(4, 2, 32, 16), (2, 1, 96, 32), (8, 2, 128, 128), (5, 5, 64, None)])
def test_heads(
    H: int, G: int, K: int, R: int | None, interleaved: bool, norm: bool, dtype: torch.dtype, device: str
) -> None:
    check([3, 130, 64], H, G, K, R, dtype, device, norm, interleaved)


def test_what_the_kernel_does_not_support(device: str) -> None:
    def call(H: int, G: int, K: int, counters: int | None = None) -> None:
        qkv = torch.randn(1, (H + 2 * G) * K, dtype=torch.bfloat16, device=device)
        cache = torch.zeros(1, 2, G, 16, K, dtype=torch.bfloat16, device=device)
        index = int32(0, device=device)
        given = None if counters is None else torch.zeros(counters, dtype=torch.int32, device=device)
        decode_attention_(qkv, cache, index[None], index + 1, index, counters=given)

    with refused_by_kernels("decode_attention_", device, "H / G, the queries of a key, are 17, .* at most 16"):
        call(17, 1, 64)
    with refused_by_kernels("decode_attention_", device, "K, the head size, is 256, but must be 32, 64, 96 or 128"):
        call(1, 1, 256)
    with refused_by_kernels("decode_attention_", device, "counters has 1 elements, but must have at least 2"):
        call(2, 2, 64, 1)


def test_arguments(device: str) -> None:
    cache, index = torch.zeros(3, 2, 2, 4, 8, device=device), int32(0, 1, device=device)
    pages, qkv = index.view(2, 1), torch.randn(2, 64, device=device)
    with refused("decode_attention_: qkv has 40 features.* K = 8"):
        decode_attention_(qkv[:, :40].contiguous(), cache, pages, index, index)
    with refused("decode_attention_: window is 0"):
        decode_attention_(qkv, cache, pages, index, index, window=0)
    with refused(r"decode_attention_: seq_lens of shape \[1\] has B = 1, but qkv has B = 2"):
        decode_attention_(qkv, cache, pages, index[:1], index)


def test_nothing_is_stored_beyond_the_block_table(dtype: torch.dtype, chosen: Implementation) -> None:
    """Where eager bodies raise: kernels cannot, and must not write to the next sequence's pages."""
    cache, pages = torch.zeros(3, 2, 1, 16, 32, dtype=dtype, device=chosen.device), int32(0, 2, device=chosen.device)
    qkv, lengths = torch.randn(2, 96, dtype=dtype, device=chosen.device), int32(17, 3, device=chosen.device)
    if chosen.name == "eager":
        with refused(r"decode_attention_: seq_lens\[0\] is 17, but must be in 0 to 16"):
            decode_attention_(qkv, cache, pages.view(2, 1), lengths, lengths - 1)
        return
    spare = torch.cat((pages, pages[:1])).view(3, 1)[:2]  # what lies behind the table can be read
    decode_attention_(qkv, cache, spare, lengths, lengths - 1)
    assert not cache[:2].any()
    assert cache[2, :, :, 2].any(dim=-1).all()
