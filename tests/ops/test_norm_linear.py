"""norm_linear against its float64 formula."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, numpy, poisoned, refused, refused_by_kernels

from pyllama.ops.norm_linear import norm_linear
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    norm, weight = 1 + 0.1 * torch.randn(16, dtype=dtype), torch.randn(24, 16, dtype=dtype)
    yield torch.randn(3, 16, dtype=dtype), norm, 1e-5, weight, torch.randn(24, dtype=dtype)
    yield torch.randn(2, 16, dtype=dtype), None, 0.0, weight, None, True


def normalised(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    return x if weight is None else x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


SHAPES = [(1, 8, 8), (1, 2048, 33), (3, 264, 40), (8, 512, 16), (9, 2312, 24), (16, 72, 130), (5, 4104, 17), (2, 16, 0)]


@pytest.mark.parametrize(("T", "D", "F"), [*SHAPES, (0, 64, 32)])
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, D: int, F: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(T, D, dtype=dtype, device=device), torch.randn(F, D, dtype=dtype, device=device) / D**0.5
    norm = 1 + 0.1 * torch.randn(D, dtype=dtype, device=device) if early else None
    bias = torch.randn(F, dtype=dtype, device=device) if T % 2 else None
    out = norm_linear(x, norm, 1e-5, weight, bias, early)
    assert out.dtype == dtype
    assert out.is_contiguous()
    normed = normalised(numpy(x), None if norm is None else numpy(norm), 1e-5)
    expected = normed @ numpy(weight).T + (0 if bias is None else numpy(bias))
    rounded = (np.abs(normed) @ np.abs(numpy(weight)).T).max(initial=0) if early else 0
    assert_close(out, expected, rounded_within=rounded)


def test_large_values_are_normalised_before_the_product(device: str) -> None:
    """Their products would not fit float16."""
    x = torch.full((1, 64), 6e4, dtype=torch.float16, device=device)
    weight = torch.ones(8, 64, dtype=torch.float16, device=device)
    assert (norm_linear(x, torch.full_like(x[0], 2.0), 1e-5, weight) == 128).all()


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    x = poisoned(5, 320, dtype=dtype, device=device)
    x[:, 64:192] = torch.randn(5, 128)
    weight = torch.randn(8, 128, dtype=dtype, device=device)
    assert_close(norm_linear(x[:, 64:192], None, 0.0, weight), numpy(x[:, 64:192]) @ numpy(weight).T)


def test_tokens_do_not_depend_on_each_other(dtype: torch.dtype, device: str) -> None:
    """A row of NaN stays one, and what kernels give does not depend on how many tokens there are."""
    x, norm = torch.randn(16, 520, dtype=dtype, device=device), torch.ones(520, dtype=dtype, device=device)
    weight = torch.randn(40, 520, dtype=dtype, device=device) / 20
    every = norm_linear(x, norm, 1e-5, weight)
    alone = torch.cat([norm_linear(row[None], norm, 1e-5, weight) for row in x])
    torch.testing.assert_close(every, alone, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2)
    if implementation("norm_linear", device) != "eager":
        assert (every == alone).all()
    x[3] = float("nan")
    poisoned_row = norm_linear(x, norm, 1e-5, weight)
    assert poisoned_row[3].isnan().all()
    rest = [t for t in range(16) if t != 3]
    assert (poisoned_row[rest] == every[rest]).all()


def test_what_the_kernel_does_not_support(device: str) -> None:
    weight = torch.randn(8, 16, device=device)
    with refused_by_kernels("norm_linear", device, "T, the number of tokens, is 17, but must be at most 16"):
        norm_linear(torch.randn(17, 16, device=device), None, 0.0, weight)
    with refused_by_kernels("norm_linear", device, "D, the features of x, are 12, but must be a multiple of 8"):
        norm_linear(torch.randn(2, 12, device=device), None, 0.0, weight[:, :12].contiguous())
    with refused_by_kernels("norm_linear", device, "weight must be contiguous"):
        norm_linear(torch.randn(2, 8, device=device), None, 0.0, weight[:, :8])


def test_arguments(device: str) -> None:
    x, weight = torch.randn(2, 16, device=device), torch.randn(8, 16, device=device)
    with refused(r"norm_linear: weight of shape \[8, 8\] has D = 8, but x has D = 16"):
        norm_linear(x, None, 0.0, weight[:, :8])
    with refused("norm_linear: norm_weight must have .*dtype"):
        norm_linear(x, torch.ones(16, dtype=torch.float16, device=device), 0.0, weight)
    with refused(r"norm_linear: bias of shape \[7\] has F = 7, but weight has F = 8"):
        norm_linear(x, None, 0.0, weight, torch.ones(7, device=device))
