"""rms_norm against its float64 formula, row by row."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close, numpy, refused, refused_by_kernels
from torch import Tensor

from pyllama.ops.rms_norm import rms_norm


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=dtype), 1e-6
    yield torch.randn(2, 3, 16, dtype=dtype), torch.randn(16, dtype=dtype), 0.5


def reference(x: Tensor, weight: Tensor, eps: float) -> np.ndarray:
    rows, w = numpy(x).reshape(-1, x.shape[-1]), numpy(weight)
    out = np.zeros_like(rows)
    for i, row in enumerate(rows):
        out[i] = row / np.sqrt(np.dot(row, row) / len(row) + eps) * w
    return out.reshape(x.shape)


SHAPES = [(1, 64), (7, 768), (2, 3, 5, 128), (8,), (0, 64), (300, 8), (3, 8192), (2, 20000)]
# A thread has one or two vectors of several short rows, four or eight of a long one, and reads the widest rows again.
SHAPES += [(77, 24), (45, 72), (9, 136), (5, 264), (1, 40008)]
LARGE = pytest.param((1, 65536), marks=pytest.mark.large)


@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_wider_than_half_precision(dtype: torch.dtype, device: str) -> None:
    """Squares of 1000 overflow float16, and those of 1e-4 vanish in it."""
    x = torch.cat([torch.full((1, 64), 1000.0), torch.full((1, 64), 1e-4), torch.zeros(1, 64)]).to(device, dtype)
    weight = torch.ones(64, dtype=dtype, device=device)
    assert_close(rms_norm(x, weight, 1e-12), reference(x, weight, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    """A head of a QKV product: rows lie apart."""
    x = torch.randn(5, 3, 192, dtype=dtype, device=device)[:, 1:, 64:128]
    weight = torch.randn(64, dtype=dtype, device=device)
    out = rms_norm(x, weight, 1e-6)
    assert out.is_contiguous()
    assert_close(out, reference(x, weight, 1e-6))


def test_what_the_kernel_does_not_support(device: str) -> None:
    for D in (12, 65544):
        with refused_by_kernels(
            "rms_norm", device, f"D, the last dimension of x, is {D}, .* a multiple of 8 up to 65536"
        ):
            rms_norm(torch.ones(2, D, device=device), torch.ones(D, device=device), 1e-6)
    x, weight = torch.ones(4, 3, 16, device=device), torch.ones(8, device=device)
    with refused_by_kernels("rms_norm", device, "x must have every row at a multiple of 16 bytes"):
        rms_norm(x[:, :, 1:9], weight, 1e-6)
    with refused_by_kernels("rms_norm", device, "x must be contiguous"):
        rms_norm(x[:, :, ::2], weight, 1e-6)


def test_agrees_with_torch() -> None:
    x, weight = torch.randn(5, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (33,), weight, 1e-6))


def test_arguments(device: str) -> None:
    x, weight = torch.randn(2, 64, device=device), torch.randn(72, device=device)
    with refused(r"rms_norm: weight of shape \[72\] has D = 72, but x has D = 64"):
        rms_norm(x, weight, 1e-6)
    with refused("rms_norm: weight must have .*dtype of x"):
        rms_norm(x, torch.ones(64, device=device, dtype=torch.bfloat16), 1e-6)
    with refused(r"rms_norm: weight must have shape \[D\]"):
        rms_norm(x, weight[None], 1e-6)
    with refused("rms_norm: x must "):
        rms_norm(x.int(), weight.int(), 1e-6)
