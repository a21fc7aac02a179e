"""moe_combine token by token in float64."""

from collections.abc import Iterator

import pytest
import torch
from comparing import assert_close, int32, numpy, refused

from pyllama.ops.moe_combine import moe_combine


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    positions = torch.randperm(6, dtype=torch.int32).view(3, 2)
    yield torch.randn(6, 8, dtype=dtype), positions, torch.rand(3, 2)


@pytest.mark.parametrize(("T", "N", "D"), [(1, 1, 64), (1, 8, 768), (33, 4, 128), (0, 2, 64), (5, 3, 8), (3, 5, 2056)])
def test_formula(T: int, N: int, D: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(T * N, D, dtype=dtype, device=device)
    positions = torch.randperm(T * N, dtype=torch.int32).view(T, N).to(device)
    weights = torch.rand(T, N, dtype=torch.promote_types(dtype, torch.float32), device=device)
    out = moe_combine(x, positions, weights)
    assert out.dtype == dtype
    assert out.is_contiguous()
    rows, places, w = numpy(x), positions.tolist(), numpy(weights)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for n in range(N):
            expected[t] += torch.from_numpy(w[t, n] * rows[places[t][n]])
    assert_close(out, expected)


def test_rows_that_no_token_names_are_not_read(device: str) -> None:
    x = torch.full((3, 64), float("nan"), device=device)
    x[1] = 2.0
    out = moe_combine(x, int32(1, 1, device=device).view(1, 2), torch.tensor([[0.5, 0.25]], device=device))
    assert (out == 1.5).all()


def test_arguments(device: str) -> None:
    x, positions, weights = torch.randn(4, 8, device=device), torch.zeros(2, 2).int().to(device), torch.ones(2, 3)
    with refused(r"moe_combine: weights of shape \[2, 3\] has N = 3, but positions has N = 2"):
        moe_combine(x, positions, weights.to(device))
    with refused("moe_combine: positions must have .*int32"):
        moe_combine(x, positions.long(), weights[:, :2].to(device))
    with refused("moe_combine: weights must have .*float"):
        moe_combine(x, positions, positions)
