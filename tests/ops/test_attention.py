"""attention against softmax over the visible keys, query by query in float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close, attention_of_sequence, bounds, int32, numpy, refused, rounded_weights
from conftest import Implementation

from pyllama.ops.attention import attention


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    q, k, v = (torch.randn(rows, heads, 4, dtype=dtype) for rows, heads in ((5, 4), (9, 2), (9, 2)))
    yield q, k, v, int32(0, 2, 5), int32(0, 3, 9), 3, 6
    yield q, k, v[:, :, :3].contiguous(), int32(0, 4, 5), int32(0, 2, 9), 4, 7, 0.3, 2
    if dtype != torch.float64:  # of which finite differences would take long: kernels have no smaller heads
        q, k, v = (torch.randn(rows, heads, 32, dtype=dtype) for rows, heads in ((3, 2), (4, 1), (4, 1)))
        yield q, k, v, int32(0, 2, 3), int32(0, 2, 4), 2, 2


# Lengths of queries and keys of each sequence: equal (training), one query (decode), a chunk at the end of longer
# keys, fewer keys than queries, none of one or the other, no sequence at all.
LENGTHS = {
    "whole": ([7, 1, 33], [7, 1, 33]),
    "decode": ([1, 1], [19, 1]),
    "chunk": ([5, 3], [12, 40]),
    "more-queries": ([6, 4], [2, 0]),
    "empty": ([0, 3, 0], [4, 3, 0]),
    "none": ([], []),
    "long": ([130], [200]),
}


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_formula(
    lengths: tuple[list[int], list[int]], H: int, G: int, window: int | None, dtype: torch.dtype, chosen: Implementation
) -> None:
    q_lengths, k_lengths = lengths
    K, device = 64, chosen.device
    q = torch.randn(sum(q_lengths), H, K, dtype=dtype, device=device)
    k, v = torch.randn(2, sum(k_lengths), G, K, dtype=dtype, device=device)
    out = attention(
        q,
        k,
        v,
        bounds(q_lengths, device),
        bounds(k_lengths, device),
        max(q_lengths, default=0),
        max(k_lengths, default=0),
        window=window,
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    expected = [attention_of_sequence(*map(numpy, qkv), K**-0.5, window) for qkv in sequences]
    assert_close(
        out,
        torch.cat([torch.zeros(0, H, K, dtype=torch.float64), *map(torch.from_numpy, expected)]),
        rounded_within=rounded_weights(chosen.name, v),
    )


@pytest.mark.parametrize(
    ("K", "V"), [(32, 32), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256), (32, 16), (40, 24)]
)
def test_head_sizes_and_scale(K: int, V: int, dtype: torch.dtype, chosen: Implementation) -> None:
    """Queries at the end of more keys, as views of longer rows."""
    n, m, device = 21, 70, chosen.device
    q = torch.randn(n, 4, K + 8, dtype=dtype, device=device)[..., :K]
    k, v = (torch.randn(m, 2, size + 16, dtype=dtype, device=device)[..., :size] for size in (K, V))
    cu_q, cu_k = bounds([n], device), bounds([m], device)
    if chosen.name != "eager" and dtype.itemsize == 2 and K < 64 and V < 32:
        with refused(f"attention: K = {K} and V = {V}, the head sizes, but must be"):
            attention(q, k, v, cu_q, cu_k, n, m)
        return
    out = attention(q, k, v, cu_q, cu_k, n, m, scale=0.17)
    expected = attention_of_sequence(numpy(q), numpy(k), numpy(v), 0.17)
    assert_close(out, expected, rounded_within=rounded_weights(chosen.name, v))


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_of_many_keys(window: int | None, dtype: torch.dtype, chosen: Implementation) -> None:
    """Keys are split among blocks; a second sequence has too few for that."""
    q_lengths, k_lengths, device = [3, 2], [1100, 50], chosen.device
    q = torch.randn(5, 2, 64, dtype=dtype, device=device)
    k, v = torch.randn(2, 1150, 1, 64, dtype=dtype, device=device)
    out = attention(q, k, v, bounds(q_lengths, device), bounds(k_lengths, device), 3, 1100, window=window)
    sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    expected = [torch.from_numpy(attention_of_sequence(*map(numpy, qkv), 0.125, window)) for qkv in sequences]
    assert_close(out, torch.cat(expected), rounded_within=rounded_weights(chosen.name, v))


def test_parts_of_one_product(device: str) -> None:
    """q, k and v as views of a QKV product."""
    qkv = torch.randn(11, 8, 64, device=device)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    out = attention(q, k, v, bounds([11], device), bounds([11], device), 11, 11)
    assert_close(out, attention_of_sequence(numpy(q), numpy(k), numpy(v), 64**-0.5))


def test_large_scores(device: str) -> None:
    """A softmax that does not subtract the maximum overflows."""
    q, k, v = 100 * torch.randn(3, 5, 2, 64, device=device)
    out = attention(q, k, v, bounds([5], device), bounds([5], device), 5, 5)
    assert_close(out, attention_of_sequence(numpy(q), numpy(k), numpy(v), 64**-0.5), roundings=1e3)


def test_agrees_with_torch() -> None:
    q, k, v = torch.randn(3, 20, 4, 32, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
    torch.testing.assert_close(attention(q, k, v, bounds([20]), bounds([20]), 20, 20), expected)


def test_arguments(device: str) -> None:
    q, k, v = (torch.randn(5, heads, 64, device=device) for heads in (3, 2, 2))
    whole = bounds([5], device)
    with refused("attention: q has H = 3 heads.* G = 2"):
        attention(q, k, v, whole, whole, 5, 5)
    q = q[:, :2]
    with refused("attention: window is 0"):
        attention(q, k, v, whole, whole, 5, 5, window=0)
    with refused(r"attention: v of shape \[5, 1, 64\] has G = 1, but k has G = 2"):
        attention(q, k, v[:, :1], whole, whole, 5, 5)
    with refused(r"attention: cu_seqlens_k of shape \[3\] has B = 2, but cu_seqlens_q has B = 1"):
        attention(q, k, v, whole, bounds([2, 3], device), 5, 5)
    with refused("attention: k must have .*dtype of q"):
        attention(q, k.double(), v, whole, whole, 5, 5)


def test_bounds_that_do_not_cover_the_rows() -> None:
    """Only eager bodies read values."""
    q, k, v = torch.randn(3, 5, 2, 64)
    for wrong in ([0, 4], [1, 5], [0, 6, 5]):
        with refused("attention: cu_seqlens_q must rise from 0 to 5"):
            attention(q, k, v, int32(*wrong), bounds([5, 0][: len(wrong) - 1]), 5, 5)
