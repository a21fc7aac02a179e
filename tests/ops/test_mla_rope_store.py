"""mla_rope_store_ token by token in float64, on a cache of NaN in which only the named slots may change."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from comparing import assert_close, int32, numpy, poisoned, refused, refused_by_kernels
from test_rms_norm import reference as normalised
from test_rope import reference as rotated
from test_rope import table

from pyllama.ops.mla_rope_store import mla_rope_store_
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    H, K, rank, R = 3, 16, 24, 8
    for options in ((), (1e-3, True)):
        q, latent = torch.randn(5, H, K, dtype=dtype), torch.randn(5, rank + R, dtype=dtype)
        cache, weight = torch.randn(6, 4, rank + R, dtype=dtype), torch.randn(rank, dtype=dtype)
        yield q, latent, cache, weight, int32(3, 4, 5, 0, 19), int32(3, 4, 5, -1, 23), table(20, R), *options


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("T", "H", "nope", "rank", "R"),
    [
        (1, 4, 128, 512, 64),  # DeepSeek's sizes, one token
        (9, 3, 16, 24, 8),
        (0, 2, 16, 32, 8),
        (40, 2, 16, 40, 16),  # a stretch over several pages
        (5, 1, 0, 1, 2),  # heads that are all rotated, the smallest latent
        (6, 5, 7, 33, 10),  # nothing aligned
    ],
)
def test_formula(
    T: int, H: int, nope: int, rank: int, R: int, interleaved: bool, dtype: torch.dtype, device: str
) -> None:
    """Queries and latents are views whose rows lie apart; a quarter of the tokens is not to be stored."""
    S, P, K, L = 12, 9, nope + R, rank + R
    q = torch.randn(T, H * K + 7, dtype=dtype, device=device)[:, 7:].unflatten(1, (H, K))
    wide = torch.randn(T, L + 24, dtype=dtype, device=device)
    latent = wide[:, 24:]
    cache = poisoned(P, S, L, dtype=dtype, device=device)
    weight = torch.randn(rank, dtype=dtype, device=device)
    positions = torch.randint(100, (T,), dtype=torch.int32, device=device)
    slots = torch.randperm(P * S)[:T].int().to(device)
    if T > 20:
        slots = torch.arange(30, 30 + T, dtype=torch.int32, device=device)
    slots[1::4] = -1
    cos_sin = table(100, R).to(device)

    expected = numpy(q)
    expected[..., nope:] = rotated(q[..., nope:], cos_sin, positions, interleaved)
    entries = np.concatenate(
        (
            normalised(latent[:, :rank], weight, 1e-3),
            rotated(latent[:, None, rank:], cos_sin, positions, interleaved)[:, 0],
        ),
        axis=1,
    )
    expected_cache = np.full(cache.shape, np.nan)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected_cache[slot // S, slot % S] = entries[t]

    before = wide.clone()
    aligned = rank % 8 == R % 8 == 0
    with nullcontext() if aligned else refused_by_kernels("mla_rope_store_", device, "rank is .*multiples of 8"):
        mla_rope_store_(q, latent, cache, weight, positions, slots, cos_sin, 1e-3, interleaved)
    if not aligned and implementation("mla_rope_store_", device) != "eager":
        return
    assert_close(q, expected)
    assert torch.equal(wide, before)
    written = torch.from_numpy(~np.isnan(expected_cache))
    assert torch.equal(~cache.isnan().cpu(), written)
    assert_close(cache.cpu()[written], torch.from_numpy(expected_cache)[written])


def test_all_padding_stores_nothing(device: str) -> None:
    cache, index = poisoned(2, 4, 16, dtype=torch.float32, device=device), int32(0, 1, device=device)
    q, latent = torch.randn(2, 3, 8, device=device), torch.randn(2, 16, device=device)
    weight, cos_sin = torch.ones(8, device=device), table(9, 8).to(device)
    mla_rope_store_(q, latent, cache, weight, index, int32(-1, -1, device=device), cos_sin)
    assert cache.isnan().all()


def test_arguments(device: str) -> None:
    q, latent, cache = (torch.randn(shape, device=device) for shape in ((2, 3, 8), (2, 12), (3, 4, 12)))
    weight, index, cos_sin = torch.ones(8, device=device), int32(0, 1, device=device), table(9, 4).to(device)
    tail = index, index, cos_sin
    with refused(r"mla_rope_store_: weight has rank = 7 and cos_sin R = 4, .* add up to L = 12, .* q's K = 8"):
        mla_rope_store_(q, latent, cache, weight[:7], *tail)
    with refused("mla_rope_store_: weight has rank = 8 and cos_sin R = 6"):
        mla_rope_store_(q, latent, cache, weight, index, index, table(9, 6).to(device))
    with refused("mla_rope_store_: weight has rank = 8 and cos_sin R = 4, .* R must be at most q's K = 3"):
        mla_rope_store_(q[..., :3], latent, cache, weight, *tail)
    with refused("rope: cos_sin's last dimension R is 3, but must be even|rank is 8 and R 3, but both must be"):
        mla_rope_store_(q, latent[:, 1:], cache[..., 1:], weight, index, index, cos_sin[:, :3])
    with refused(r"mla_rope_store_: latent of shape \[1, 12\] has T = 1, but q has T = 2"):
        mla_rope_store_(q, latent[:1], cache, weight, *tail)
    with refused(r"mla_rope_store_: kv_cache of shape \[3, 4, 11\] has L = 11, but latent has L = 12"):
        mla_rope_store_(q, latent, cache[..., 1:], weight, *tail)
    with refused(r"mla_rope_store_: kv_cache must have shape \[P, S, L\], but has \[1, 3, 4, 12\]"):
        mla_rope_store_(q, latent, cache[None], weight, *tail)
    with refused(r"mla_rope_store_: positions of shape \[1\] has T = 1"):
        mla_rope_store_(q, latent, cache, weight, index[:1], index, cos_sin)
    with refused("mla_rope_store_: slots must have .*int32, but has .*int64"):
        mla_rope_store_(q, latent, cache, weight, index, index.long(), cos_sin)
    with refused("mla_rope_store_: weight must have .*(float32|the dtype of q)"):
        mla_rope_store_(q, latent, cache, weight.double(), *tail)
    with pytest.raises(RuntimeError, match=r"mla_rope_store_.*it writes in place: use torch\.no_grad"):
        mla_rope_store_(q.requires_grad_(), latent, cache, weight, *tail)
