"""linear_add_ against its float64 formula."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, numpy, poisoned, refused, refused_by_kernels
from conftest import Implementation
from test_norm_linear import SHAPES

from pyllama.ops.linear_add import linear_add_
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    weight = torch.randn(24, 16, dtype=dtype)
    yield torch.randn(3, 24, dtype=dtype), torch.randn(3, 16, dtype=dtype), weight, torch.randn(24, dtype=dtype)
    yield torch.randn(2, 24, dtype=dtype), torch.randn(2, 16, dtype=dtype), weight, None, True, torch.zeros_like(weight)


@pytest.mark.parametrize(("T", "D", "F"), [(T, D, F // 8 * 8) for T, D, F in SHAPES] + [(0, 64, 32), (1, 8, 5)])
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, D: int, F: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(T, D, dtype=dtype, device=device), torch.randn(F, D, dtype=dtype, device=device) / D**0.5
    residual = torch.randn(T, F, dtype=dtype, device=device)
    bias = torch.randn(F, dtype=dtype, device=device) if T % 2 else None
    product = numpy(x) @ numpy(weight).T + (0 if bias is None else numpy(bias))
    expected = numpy(residual) + product
    linear_add_(residual, x, weight, bias, early)
    eager = implementation("linear_add_", device) == "eager"  # which rounds the product
    assert_close(residual, expected, rounded_within=np.abs(product).max(initial=0) if eager else 0.0)


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    """What lies between the rows is left alone."""
    buffer, x = poisoned(4, 48, dtype=dtype, device=device), torch.ones(4, 8, dtype=dtype, device=device)
    residual = buffer[:, 16:32]
    residual.fill_(1.0)
    linear_add_(residual, x, torch.ones(16, 8, dtype=dtype, device=device))
    assert (residual == 9).all()
    assert buffer.isnan().sum() == 4 * 32


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("size", [0, 1, 64, 65, 12_345, 5_000_000])
def test_what_follows_is_brought_to_the_cache(size: int, rows: int, dtype: torch.dtype, chosen: Implementation) -> None:
    """Every line of it once, up to 8 MB, by all blocks; in float32, whose arithmetic is plain, nothing."""
    x, weight = (torch.randn(n, 16, dtype=dtype, device=chosen.device) for n in (2, rows))
    prefetch = torch.empty(size, dtype=dtype, device=chosen.device)
    linear_add_(torch.zeros(2, rows, dtype=dtype, device=chosen.device), x, weight, prefetch=prefetch)
    if chosen.emulator:
        start, end = prefetch.data_ptr(), 0 if dtype is torch.float32 else min(prefetch.nbytes, 8 << 20)
        lines = range(start, start + end, 128)
        assert chosen.emulator.prefetches == (len(lines), sum(lines))


def test_what_the_kernel_does_not_support(device: str) -> None:
    weight = torch.randn(8, 16, device=device)
    with refused_by_kernels("linear_add_", device, "T, the number of tokens, is 17, but must be at most 16"):
        linear_add_(torch.randn(17, 8, device=device), torch.randn(17, 16, device=device), weight)
    with refused_by_kernels("linear_add_", device, "prefetch must be contiguous"):
        linear_add_(torch.randn(1, 8, device=device), weight[:1].clone(), weight, prefetch=weight.T)


def test_arguments(device: str) -> None:
    x = torch.randn(2, 8, device=device)
    with refused("linear_add_: x and residual are the same memory"):
        linear_add_(x, x, torch.randn(8, 8, device=device))
    with refused("linear_add_: prefetch must have .*the dtype of residual"):
        linear_add_(x, x.clone(), torch.randn(8, 8, device=device), prefetch=torch.arange(3, device=device))
    with refused("linear_add_: x of shape .* has T = 3, but residual has T = 2"):
        linear_add_(x, torch.randn(3, 8, device=device), torch.randn(8, 8, device=device))
