"""swiglu against its float64 formula."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, numpy, refused, refused_by_kernels

from pyllama.ops.swiglu import swiglu


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield (torch.randn(3, 16, dtype=dtype),)
    yield (torch.randn(2, 1, 10, dtype=dtype),)


@pytest.mark.parametrize("shape", [(1, 64), (7, 1536), (2, 3, 32), (0, 64), (16,), (5, 33024), (300, 16)])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = 4 * torch.randn(shape, dtype=dtype, device=device)
    gate, up = np.split(numpy(x), 2, axis=-1)
    out = swiglu(x)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, gate / (1 + np.exp(-gate)) * up)


def test_extremes(dtype: torch.dtype, device: str) -> None:
    """exp(-gate) overflows; the result is 0 or gate * up."""
    gate = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0, -90.0, 90.0, -0.0], dtype=dtype, device=device)
    out = swiglu(torch.cat((gate, torch.full_like(gate, 2.0))))
    assert_close(out, torch.tensor([0.0, 0.0, 0.0, 200.0, 2000.0, 0.0, 180.0, 0.0], dtype=torch.float64))


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 3, 192, dtype=dtype, device=device)[:, 1:, 64:160]
    gate, up = np.split(numpy(x), 2, axis=-1)
    out = swiglu(x)
    assert out.is_contiguous()
    assert_close(out, gate / (1 + np.exp(-gate)) * up)


def test_what_the_kernel_does_not_support(device: str) -> None:
    with refused_by_kernels("swiglu", device, "x's last dimension is 24, .* 2F with F a multiple of 8"):
        swiglu(torch.randn(2, 24, device=device))
    with refused_by_kernels("swiglu", device, "x must have every row at a multiple of 16 bytes"):
        swiglu(torch.randn(2, 20, device=device)[:, 1:17])


def test_arguments(device: str) -> None:
    with refused("swiglu: x.* 7"):
        swiglu(torch.randn(2, 7, device=device))
