"""grouped_swiglu row by row in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, bounds, int32, refused, refused_by_kernels
from test_grouped_linear import COUNTS
from test_grouped_linear import reference as product

from pyllama.ops.grouped_swiglu import grouped_swiglu
from pyllama.ops.registry import implementation


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    weight = torch.randn(4, 16, 8, dtype=dtype)
    yield torch.randn(5, 8, dtype=dtype), weight, int32(0, 2, 2, 6, 7), int32(0, 3, 3, 1, 4, 0, 2)
    yield torch.randn(5, 8, dtype=dtype), weight, int32(0, 0, 1, 5, 5)


@pytest.mark.parametrize("gather", [False, True], ids=["own-rows", "gathered"])
@pytest.mark.parametrize(("D", "F"), [(64, 64), (200, 40), (8, 8)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_formula(counts: list[int], D: int, F: int, gather: bool, dtype: torch.dtype, device: str) -> None:
    M, tokens = sum(counts), 9
    x = torch.randn(tokens if gather else M, D, dtype=dtype, device=device) / D**0.5
    weight = torch.randn(len(counts), 2 * F, D, dtype=dtype, device=device)
    rows = torch.randint(tokens, (M,), dtype=torch.int32, device=device) if gather else None
    out = grouped_swiglu(x, weight, bounds(counts, device), rows)
    assert out.dtype == dtype
    assert out.is_contiguous()
    gate, up = np.split(product(x, weight, counts, rows), 2, axis=1)
    # The eager body rounds gate and up to the type before it multiplies them.
    largest = max(np.abs(gate).max(initial=0), np.abs(up).max(initial=0))
    rounded = implementation("grouped_swiglu", device) == "eager" and dtype.itemsize == 2
    assert_close(out, gate / (1 + np.exp(-gate)) * up, rounded_within=2 * largest**2 if rounded else 0.0)


def test_experts_without_rows_are_not_read(device: str) -> None:
    weight = torch.full((3, 16, 64), float("nan"), device=device)
    weight[1] = 1.0
    out = grouped_swiglu(torch.ones(2, 64, device=device) / 64, weight, bounds([0, 2, 0], device))
    torch.testing.assert_close(out, torch.full((2, 8), 0.7310586, device=device))


def test_arguments(device: str) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(2, 16, 64, device=device)
    with refused(r"grouped_swiglu: weight of shape \[2, 16, 32\] has D = 32, but x has D = 64"):
        grouped_swiglu(x, weight[..., :32], bounds([1, 2], device))
    with refused("grouped_swiglu: weight has 15 rows, but must have 2F"):
        grouped_swiglu(x, weight[:, :15].contiguous(), bounds([1, 2], device))
    with refused_by_kernels("grouped_swiglu", device, "weight has 12 rows, but must have 2F with F a multiple of 8"):
        grouped_swiglu(x, weight[:, :12].contiguous(), bounds([1, 2], device))
