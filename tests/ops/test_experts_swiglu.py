"""experts_swiglu choice by choice in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, int32, numpy, poisoned, refused, refused_by_kernels
from torch import Tensor

from pyllama.ops.experts_swiglu import experts_swiglu


def chosen(T: int, N: int, E: int, device: str = "cpu") -> Tensor:
    """int32 [T, N]: random experts, a token's all different."""
    return torch.rand(T, E).argsort(-1)[:, :N].contiguous().to(device, torch.int32)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(3, 16, dtype=dtype), torch.randn(4, 16, 16, dtype=dtype) / 4, int32(0, 3, 2, 0, 3, 1).view(3, 2)
    yield torch.randn(1, 8, dtype=dtype), torch.randn(2, 32, 8, dtype=dtype) / 4, int32(1).view(1, 1), True


@pytest.mark.parametrize(
    ("T", "N", "E", "D", "F"),
    [
        (1, 2, 4, 64, 24),
        (1, 8, 9, 2056, 16),
        (5, 3, 4, 264, 7),
        (16, 4, 6, 72, 40),
        (9, 1, 2, 8, 8),
        (16, 32, 33, 8, 8),
        (0, 2, 4, 64, 8),
        (2, 2, 2, 16, 0),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, N: int, E: int, D: int, F: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(T, D, dtype=dtype, device=device)
    weight = torch.randn(E, 2 * F, D, dtype=dtype, device=device) / D**0.5
    indices = chosen(T, N, E, device)
    out = experts_swiglu(x, weight, indices, early)
    assert out.dtype == dtype
    assert out.shape == (T, N, F)
    both = np.einsum("td,tnfd->tnf", numpy(x), numpy(weight)[indices.cpu().numpy()])
    gate, up = np.split(both, 2, axis=-1)
    largest_gate, largest_up = (np.abs(part).max(initial=0) for part in (gate, up))
    # Bodies round gate and up; the slope of silu is below 1.1.
    slack = max(largest_gate, largest_up) * (1.1 * largest_up + largest_gate)
    assert_close(out, gate / (1 + np.exp(-gate)) * up, rounded_within=slack)


def test_experts_that_nobody_chose_are_not_read(dtype: torch.dtype, device: str) -> None:
    weight = poisoned(5, 16, 8, dtype=dtype, device=device)
    weight[1] = weight[3] = 1.0
    out = experts_swiglu(
        torch.ones(2, 8, dtype=dtype, device=device), weight, int32(1, 3, 3, 1, device=device).view(2, 2)
    )
    assert_close(out, torch.full((2, 2, 8), 64 / (1 + np.exp(-8)), dtype=torch.float64))


def test_what_the_kernel_does_not_support(device: str) -> None:
    weight = torch.randn(2, 16, 8, device=device)
    with refused_by_kernels("experts_swiglu", device, "T, the number of tokens, is 17, but must be at most 16"):
        experts_swiglu(torch.randn(17, 8, device=device), weight, torch.zeros(17, 1).int().to(device))
    weight = torch.randn(40, 16, 8, device=device)
    with refused_by_kernels("experts_swiglu", device, "N, the experts of a token, are 33, but must be at most 32"):
        experts_swiglu(torch.randn(1, 8, device=device), weight, torch.arange(33, device=device).int()[None])


def test_arguments(device: str) -> None:
    with refused("experts_swiglu: weight has 7 rows, but must have 2F"):
        experts_swiglu(
            torch.randn(1, 8, device=device), torch.randn(2, 7, 8, device=device), int32(0, device=device)[None]
        )
    with refused("experts_swiglu: indices must have .*int32"):
        experts_swiglu(
            torch.randn(1, 8, device=device), torch.randn(2, 8, 8, device=device), torch.zeros(1, 1, device=device)
        )
