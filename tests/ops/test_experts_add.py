"""experts_add_ token by token in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, int32, numpy, poisoned, refused, refused_by_kernels
from test_experts_swiglu import chosen

from pyllama.ops.experts_add import experts_add_
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    weights = torch.rand(3, 2, dtype=torch.promote_types(dtype, torch.float32))
    indices = int32(0, 3, 2, 0, 3, 1).view(3, 2)
    x, weight = torch.randn(3, 2, 8, dtype=dtype), torch.randn(4, 24, 8, dtype=dtype)
    for early in (False, True):
        yield torch.randn(3, 24, dtype=dtype), x, weight, indices, weights, early


@pytest.mark.parametrize(
    ("T", "N", "E", "D", "F"),
    [
        (1, 2, 4, 64, 24),
        (1, 8, 9, 24, 776),
        (5, 3, 4, 264, 8),
        (16, 4, 6, 72, 40),
        (3, 1, 2, 8, 2056),
        (2, 32, 33, 16, 8),
        (0, 2, 4, 64, 8),
        (1, 3, 4, 5, 16),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, N: int, E: int, D: int, F: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x, residual = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((T, N, F), (T, D)))
    weight = torch.randn(E, D, F, dtype=dtype, device=device) / F**0.5
    indices, weights = chosen(T, N, E, device), torch.rand(T, N, device=device)
    products = np.einsum("tnf,tndf->tnd", numpy(x), numpy(weight)[indices.cpu().numpy()])
    total = np.einsum("tn,tnd->td", numpy(weights), products)
    expected = numpy(residual) + total
    experts_add_(residual, x, weight, indices, weights.to(torch.promote_types(dtype, torch.float32)), early)
    eager = implementation("experts_add_", device) == "eager"  # which rounds each product and their sum
    rounded = np.abs(total).max(initial=0) + N * np.abs(products).max(initial=0) if eager else 0.0
    assert_close(residual, expected, rounded_within=rounded)


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    """What lies between the rows is left alone."""
    buffer = poisoned(3, 48, dtype=dtype, device=device)
    residual = buffer[:, 16:32]
    residual.fill_(1.0)
    x, weight = torch.ones(3, 1, 8, dtype=dtype, device=device), torch.ones(1, 16, 8, dtype=dtype, device=device)
    compute = torch.promote_types(dtype, torch.float32)
    experts_add_(
        residual, x, weight, torch.zeros(3, 1).int().to(device), torch.full((3, 1), 0.5, dtype=compute, device=device)
    )
    assert (residual == 5).all()
    assert buffer.isnan().sum() == 3 * 32


def test_experts_that_nobody_chose_are_not_read(dtype: torch.dtype, device: str) -> None:
    weight = poisoned(3, 16, 8, dtype=dtype, device=device)
    weight[1] = 1.0
    residual = torch.zeros(1, 16, dtype=dtype, device=device)
    weights = torch.ones(1, 1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    experts_add_(
        residual, torch.ones(1, 1, 8, dtype=dtype, device=device), weight, int32(1, device=device)[None], weights
    )
    assert (residual == 8).all()


def test_what_the_kernel_does_not_support(device: str) -> None:
    def call(T: int, N: int, E: int, dtype: torch.dtype = torch.float32) -> None:
        residual, x, weight = (torch.randn(*shape, device=device) for shape in ((T, 8), (T, N, 8), (E, 8, 8)))
        experts_add_(residual, x, weight, chosen(T, N, E, device), torch.ones(T, N, dtype=dtype, device=device))

    with refused_by_kernels("experts_add_", device, "T, the number of tokens, is 17, but must be at most 16"):
        call(17, 1, 2)
    with refused_by_kernels("experts_add_", device, "N, the experts of a token, are 33, but must be at most 32"):
        call(1, 33, 33)
    with refused_by_kernels("experts_add_", device, "weights must have float32"):
        call(1, 1, 1, torch.float64)


def test_arguments(device: str) -> None:
    residual, x, weight = (torch.randn(*shape, device=device) for shape in ((1, 8), (1, 1, 8), (2, 8, 8)))
    with refused("experts_add_: weights of shape .* has N = 2, but x has N = 1"):
        experts_add_(residual, x, weight, int32(0, device=device)[None], torch.ones(1, 2, device=device))
