"""norm_rope_store_ token by token in float64, on a cache of NaN in which only the named slots may change."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, int32, numpy, poisoned, refused, refused_by_kernels
from test_rms_norm import reference as normalised
from test_rope import reference as rotated
from test_rope import table
from torch import Tensor

from pyllama.ops.norm_rope_store import norm_rope_store_


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    H, G, K = 4, 2, 16
    tokens = torch.randn(5, (H + 2 * G) * K, dtype=dtype), torch.randn(6, 2, G, 4, K, dtype=dtype)
    positions, slots = int32(3, 4, 5, 0, 19), int32(3, 4, 5, -1, 23)
    yield *tokens, positions, slots
    yield *tokens, positions, slots, table(20, 16), torch.randn(K, dtype=dtype), torch.randn(K, dtype=dtype), 1e-5


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("R", [None, 64, 32])
@pytest.mark.parametrize(("T", "H", "G"), [(1, 4, 4), (9, 6, 2), (5, 8, 1), (0, 4, 2), (40, 4, 2)])
def test_formula(T: int, H: int, G: int, R: int | None, norm: bool, dtype: torch.dtype, device: str) -> None:
    check(T, H, G, 64, R, norm, R == 32, dtype, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("H", "G", "K", "R"),
    [(3, 1, 32, 16), (28, 4, 128, 128), (4, 2, 96, 32), (5, 1, 72, 48), (32, 4, 256, 256), (1, 1, 8, None)],
)
def test_head_sizes(H: int, G: int, K: int, R: int | None, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    """Also an odd number of vectors, several tokens to a block, and more heads than a block has."""
    check(6, H, G, K, R, True, interleaved, dtype, device)


def check(
    T: int, H: int, G: int, K: int, R: int | None, norm: bool, interleaved: bool, dtype: torch.dtype, device: str
) -> None:
    """The op on T random tokens, whose rows lie apart, a quarter of them not to be stored, against the reference."""
    S, P = 12, 9
    qkv = torch.randn(T, (H + 2 * G) * K + 32, dtype=dtype, device=device)[:, 16:-16]
    cache = poisoned(P, 2, G, S, K, dtype=dtype, device=device)
    positions = torch.randint(100, (T,), dtype=torch.int32, device=device)
    slots = torch.randperm(P * S)[:T].int().to(device)
    if T > 20:  # a stretch over several pages, as in prefill, with padding
        slots = torch.arange(30, 30 + T, dtype=torch.int32, device=device)
    slots[1::4] = -1
    cos_sin = None if R is None else table(100, R).to(device)
    weights = tuple(torch.randn(2, K, dtype=dtype, device=device)) if norm else (None, None)

    heads = qkv.unflatten(1, (H + 2 * G, K)).clone()
    expected = {
        part: prepared(heads[:, begin:end], weight, cos_sin, positions, interleaved)
        for part, begin, end, weight in (("q", 0, H, weights[0]), ("k", H, H + G, weights[1]))
    }
    expected_cache = np.full(cache.shape, np.nan)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_cache[slot // S, 0, :, slot % S] = expected["k"][t]
            expected_cache[slot // S, 1, :, slot % S] = numpy(heads[t, H + G :])

    norm_rope_store_(qkv, cache, positions, slots, cos_sin, *weights, 1e-5, interleaved)
    assert_close(qkv[:, : H * K].unflatten(1, (H, K)), expected["q"])
    written = torch.from_numpy(~np.isnan(expected_cache))
    assert torch.equal(~cache.isnan().cpu(), written)
    assert_close(cache.cpu()[written], torch.from_numpy(expected_cache)[written])


def prepared(
    x_THK: Tensor, weight: Tensor | None, cos_sin: Tensor | None, positions: Tensor, interleaved: bool
) -> np.ndarray:
    out = numpy(x_THK) if weight is None else normalised(x_THK, weight, 1e-5)
    return out if cos_sin is None else rotated(torch.from_numpy(out), cos_sin, positions, interleaved)


def test_one_weight_alone(device: str) -> None:
    H, G, K = 2, 1, 16
    qkv = torch.randn(3, (H + 2 * G) * K, device=device)
    weight, cache = torch.randn(K, device=device), torch.zeros(1, 2, G, 4, K, device=device)
    before = qkv.clone().view(3, -1, K)
    index = int32(0, 1, 2, device=device)
    norm_rope_store_(qkv, cache, index, index, k_weight=weight)
    assert_close(qkv.view(3, -1, K)[:, :H], numpy(before[:, :H]))
    assert_close(cache[0, 0, 0, :3], normalised(before[:, H], weight, 1e-6))


def test_what_the_kernel_does_not_support(device: str) -> None:
    index = int32(0, 1, device=device)
    for K in (20, 264):
        qkv, cache = torch.ones(2, 4 * K, device=device), torch.zeros(3, 2, 1, 4, K, device=device)
        with refused_by_kernels(
            "norm_rope_store_", device, f"K, the head size, is {K}, .* a multiple of 8 from 8 to 256"
        ):
            norm_rope_store_(qkv, cache, index, index)
    qkv, cache = torch.ones(2, 4 * 64, device=device), torch.zeros(3, 2, 1, 4, 64, device=device)
    with refused_by_kernels("norm_rope_store_", device, "cos_sin's last dimension R is 24, .* a multiple of 16"):
        norm_rope_store_(qkv, cache, index, index, table(9, 24).to(device))
    with refused_by_kernels("norm_rope_store_", device, "kv_cache must be contiguous"):
        norm_rope_store_(qkv, cache[::2], index, index)


def test_arguments(device: str) -> None:
    cache, index = torch.zeros(3, 2, 2, 4, 8, device=device), int32(0, 1, device=device)
    with refused("norm_rope_store_: qkv has 40 features.* K = 8"):  # one query head for two key heads
        norm_rope_store_(torch.randn(2, 40, device=device), cache, index, index)
    with refused("norm_rope_store_: qkv has 60 features"):
        norm_rope_store_(torch.randn(2, 60, device=device), cache, index, index)
    qkv = torch.randn(2, 64, device=device)
    with refused(r"norm_rope_store_: slots of shape \[1\] has T = 1, but qkv has T = 2"):
        norm_rope_store_(qkv, cache, index, index[:1])
    with refused(r"norm_rope_store_: kv_cache must have shape \[P, 2, G, S, K\]"):
        norm_rope_store_(qkv, cache[:, :1], index, index)
    with refused(r"norm_rope_store_: q_weight of shape \[4\] has K = 4, but kv_cache has K = 8"):
        norm_rope_store_(qkv, cache, index, index, q_weight=torch.ones(4, device=device))
