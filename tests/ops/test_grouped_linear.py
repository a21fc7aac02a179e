"""grouped_linear row by row in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, bounds, int32, numpy, refused, refused_by_kernels
from torch import Tensor

from pyllama.ops.grouped_linear import grouped_linear


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    weight = torch.randn(4, 16, 8, dtype=dtype)
    yield torch.randn(5, 8, dtype=dtype), weight, int32(0, 2, 2, 6, 7), int32(0, 3, 3, 1, 4, 0, 2)
    yield torch.randn(5, 8, dtype=dtype), weight, int32(0, 0, 1, 5, 5)
    rows, scale = int32(0, 3, 3, 1), torch.rand(4, dtype=dtype) + 0.5
    yield torch.randn(5, 8, dtype=dtype), weight, int32(0, 2, 2, 2, 4), rows, scale
    yield torch.randn(4, 8, dtype=dtype), weight, int32(0, 1, 4, 4, 4), None, scale


def reference(x: Tensor, weight: Tensor, counts: list[int], rows: Tensor | None) -> np.ndarray:
    x_TD, weight_EFD = numpy(x), numpy(weight)
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    sources = range(len(owners)) if rows is None else rows.tolist()
    out = [weight_EFD[e] @ x_TD[source] for e, source in zip(owners, sources, strict=True)]
    return np.array(out).reshape(len(owners), weight.shape[1])


COUNTS = {
    "one-token": [0, 1, 0, 1],
    "all-to-one": [0, 37, 0, 0],
    "uneven": [5, 0, 1, 70],
    "even": [16, 16, 16, 16],
    "empty": [0, 0, 0, 0],
    "one-each": [1] * 40,
    "around-64": [63, 64, 65, 0, 1],
    "large": [129, 0, 300],
}


@pytest.mark.parametrize("gather", [False, True], ids=["own-rows", "gathered"])
@pytest.mark.parametrize(("D", "F"), [(64, 128), (264, 72), (8, 8)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_formula(counts: list[int], D: int, F: int, gather: bool, dtype: torch.dtype, device: str) -> None:
    M, tokens = sum(counts), 9
    x = torch.randn(tokens if gather else M, D, dtype=dtype, device=device)
    weight = torch.randn(len(counts), F, D, dtype=dtype, device=device)
    rows = torch.randint(tokens, (M,), dtype=torch.int32, device=device) if gather else None
    out = grouped_linear(x, weight, bounds(counts, device), rows)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, reference(x, weight, counts, rows))


def test_many_experts(device: str, dtype: torch.dtype) -> None:
    counts = [(e % 5) * (e % 3) for e in range(509)]
    x, weight = torch.randn(sum(counts), 16, dtype=dtype, device=device), torch.randn(509, 16, 16, dtype=dtype)
    weight = weight.to(device)
    assert_close(grouped_linear(x, weight, bounds(counts, device)), reference(x, weight, counts, None))


@pytest.mark.parametrize("counts", [[3, 0, 20], [70, 100, 1]])
def test_scaled_rows(counts: list[int], dtype: torch.dtype, device: str) -> None:
    M = sum(counts)
    x, weight = torch.randn(M, 72, dtype=dtype, device=device), torch.randn(3, 40, 72, dtype=dtype, device=device)
    scale = torch.rand(M, dtype=torch.promote_types(dtype, torch.float32), device=device)
    out = grouped_linear(x, weight, bounds(counts, device), scale=scale)
    expected = numpy(scale)[:, None] * reference(x, weight, counts, None)
    assert_close(out, expected, 2 if dtype.itemsize == 2 else 1)  # the eager body rounds twice
    with refused("grouped_linear: scale (has|of shape)"):
        grouped_linear(x, weight, bounds(counts, device), scale=scale[1:].clone())


def test_experts_without_rows_are_not_read(device: str) -> None:
    weight = torch.full((3, 8, 64), float("nan"), device=device)
    weight[1] = 1.0
    out = grouped_linear(torch.ones(2, 64, device=device), weight, bounds([0, 2, 0], device))
    assert (out == 64).all()


def test_experts_without_rows_get_a_zero_gradient(device: str) -> None:
    weight = torch.randn(3, 8, 64, device=device, requires_grad=True)
    x = torch.ones(2, 64, device=device, requires_grad=True)
    grouped_linear(x, weight, bounds([0, 2, 0], device)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].eq(0).all()
    assert weight.grad[1].eq(2).all()
    assert weight.grad[2].eq(0).all()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("gather", [False, True], ids=["own-rows", "gathered"])
@pytest.mark.parametrize("counts", [[5, 0, 1, 70], [0, 0, 0], [0, 37]], ids=["uneven", "empty", "all-to-one"])
def test_gradients_of_the_formula(
    counts: list[int], gather: bool, scaled: bool, dtype: torch.dtype, device: str
) -> None:
    """Against autograd through a loop over the experts in float64, whatever ran the forward."""
    M, D, F = sum(counts), 24, 40
    rows = torch.randint(9, (M,), dtype=torch.int32, device=device) if gather else None
    x = torch.randn(9 if gather else M, D, dtype=dtype, device=device)
    weight = torch.randn(len(counts), F, D, dtype=dtype, device=device)
    scale = torch.rand(M, dtype=torch.promote_types(dtype, torch.float32), device=device) if scaled else None
    grad = torch.randn(M, F, dtype=dtype, device=device)
    given = [t for t in (x, weight, scale) if t is not None]
    for tensor in given:
        tensor.requires_grad_()
    out = grouped_linear(x, weight, bounds(counts, device), rows, scale)
    wide = [t.detach().cpu().double().requires_grad_() for t in given]
    sources = wide[0] if rows is None else wide[0][rows.cpu().long()]
    parts = [part @ weight_FD.T for part, weight_FD in zip(sources.split(counts), wide[1], strict=True)]
    expected = torch.cat(parts) * (wide[2].unsqueeze(1) if scaled else 1)
    wanted = torch.autograd.grad(expected, wide, grad.cpu().double())
    for found, right in zip(torch.autograd.grad(out, given, grad), wanted, strict=True):
        assert found.is_contiguous()
        tolerance = (8 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.cpu().double(), right, rtol=0, atol=tolerance * (right.abs().max().item() if right.numel() else 0)
        )


def test_arguments(device: str) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(2, 8, 64, device=device)
    with refused(r"grouped_linear: weight of shape \[2, 8, 32\] has D = 32, but x has D = 64"):
        grouped_linear(x, weight[..., :32], bounds([1, 2], device))
    with refused(r"grouped_linear: offsets of shape \[2\] has E = 1, but weight has E = 2"):
        grouped_linear(x, weight, bounds([3], device))
    with refused("grouped_linear: rows must have .*int32"):
        grouped_linear(x, weight, bounds([1, 2], device), torch.zeros(3, dtype=torch.int64, device=device))


def test_what_kernels_do_not_take(device: str) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(2, 16, 64, device=device)
    for bad_x, bad_weight, message in (
        (x[:, :12], weight[..., :12], "D, the input features, are 12, but must be a multiple of 8"),
        (x, weight[:, :12], "weight has 12 rows, but must have a multiple of 8"),
        (x, torch.randn(2 * 16 * 64 + 1, device=device)[1:].view(2, 16, 64), "weight must start at a multiple of 16"),
    ):
        with refused_by_kernels("grouped_linear", device, message):
            grouped_linear(bad_x, bad_weight, bounds([1, 2], device))
    with refused_by_kernels("grouped_linear", device, "E, the number of experts, is 513, but must be in 1 to 512"):
        grouped_linear(x, torch.randn(513, 8, 64, device=device), bounds([3] + [0] * 512, device))


def test_offsets_that_do_not_cover_the_rows() -> None:
    """Only the eager body reads values."""
    with refused("grouped_linear: offsets must rise from 0 to 3"):
        grouped_linear(torch.randn(3, 8), torch.randn(2, 4, 8), int32(0, 1, 2))
