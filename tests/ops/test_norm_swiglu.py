"""norm_swiglu against its float64 formula."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, numpy, refused, refused_by_kernels
from test_norm_linear import SHAPES, normalised

from pyllama.ops.norm_swiglu import norm_swiglu


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    norm, weight = 1 + 0.1 * torch.randn(16, dtype=dtype), torch.randn(24, 16, dtype=dtype) / 4
    yield torch.randn(3, 16, dtype=dtype), norm, 1e-5, weight, torch.randn(24, dtype=dtype)
    yield torch.randn(2, 16, dtype=dtype), None, 0.0, weight, None, True


@pytest.mark.parametrize(("T", "D", "F"), [*SHAPES, (0, 64, 32)])
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, D: int, F: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(T, D, dtype=dtype, device=device), torch.randn(2 * F, D, dtype=dtype, device=device)
    norm = 1 + 0.1 * torch.randn(D, dtype=dtype, device=device) if early else None
    bias = torch.randn(2 * F, dtype=dtype, device=device) if T % 2 else None
    weight /= D**0.5
    out = norm_swiglu(x, norm, 1e-5, weight, bias, early)
    assert out.dtype == dtype
    assert out.shape == (T, F)
    normed = normalised(numpy(x), None if norm is None else numpy(norm), 1e-5)
    gate, up = np.split(normed @ numpy(weight).T + (0 if bias is None else numpy(bias)), 2, axis=-1)
    rounded = (np.abs(normed) @ np.abs(numpy(weight)).T).max(initial=0) if early else 0
    # Bodies round gate and up, too; the slope of silu is below 1.1.
    largest_gate, largest_up = (np.abs(part).max(initial=0) for part in (gate, up))
    slack = (rounded + max(largest_gate, largest_up)) * (1.1 * largest_up + largest_gate)
    assert_close(out, gate / (1 + np.exp(-gate)) * up, rounded_within=slack)


def test_gate_comes_first(dtype: torch.dtype, device: str) -> None:
    """A gate of 0 shuts, an up part of 0 gives 0, both at 1 give silu(1)."""
    x = torch.eye(3, 8, dtype=dtype, device=device)
    weight = torch.tensor([[0.0, 1, 1], [1.0, 0, 1]], dtype=dtype, device=device)
    weight = torch.cat((weight, torch.zeros(2, 5, dtype=dtype, device=device)), dim=1)
    out = norm_swiglu(x, None, 0.0, weight)
    assert_close(out, torch.tensor([[0.0], [0.0], [1 / (1 + np.exp(-1))]], dtype=torch.float64))


def test_what_the_kernel_does_not_support(device: str) -> None:
    with refused_by_kernels("norm_swiglu", device, "T, the number of tokens, is 17, but must be at most 16"):
        norm_swiglu(torch.randn(17, 16, device=device), None, 0.0, torch.randn(8, 16, device=device))


def test_arguments(device: str) -> None:
    with refused("norm_swiglu: weight has 7 rows, but must have 2F"):
        norm_swiglu(torch.randn(2, 8, device=device), None, 0.0, torch.randn(7, 8, device=device))
