"""add_rms_norm_ against its float64 formula; the sum it normalises is the rounded one that it stores."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from comparing import assert_close, refused, refused_by_kernels
from test_rms_norm import reference
from torch._subclasses import FakeTensorMode

from pyllama.ops.add_rms_norm import add_rms_norm_


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=dtype), 1e-6


SHAPES = [(1, 64), (7, 768), (2, 3, 128), (0, 64), (3, 8192), (77, 24), (45, 72), (5, 264), (1, 20008)]
LARGE = pytest.param((1, 65536), marks=pytest.mark.large)


@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_formula(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, residual = torch.randn(2, *shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    total = (x.double() + residual.double()).to(dtype)
    expected = reference(total, weight, 1e-5)
    assert add_rms_norm_(x, residual, weight, 1e-5) is None
    assert torch.equal(residual, total)
    assert_close(x, expected)


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    """Both are parts of longer rows, of different lengths; what lies between stays as it is."""
    wide_x, wide_residual = torch.randn(5, 3, 192, dtype=dtype, device=device), torch.randn(5, 2, 256).to(device, dtype)
    x, residual = wide_x[:, 1:, 64:128], wide_residual[:, :, 8:72]
    weight = torch.randn(64, dtype=dtype, device=device)
    total = (x.double() + residual.double()).to(dtype)
    expected_x, expected_residual = wide_x.clone().double(), wide_residual.clone()
    expected_x[:, 1:, 64:128] = torch.from_numpy(reference(total, weight, 1e-5))
    expected_residual[:, :, 8:72] = total
    add_rms_norm_(x, residual, weight, 1e-5)
    assert torch.equal(wide_residual, expected_residual)
    assert_close(wide_x, expected_x.cpu())


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
def test_one_tensor_as_both_is_refused(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        x, weight = torch.ones(2, 4, 64), torch.ones(64)
        for residual in (x, x.view(2, 4, 64)):
            with refused("add_rms_norm_: x and residual are the same memory"):
                add_rms_norm_(x, residual, weight, 1e-6)
        add_rms_norm_(x[0], x[1], weight, 1e-6)  # parts of one tensor that share nothing


def test_arguments(device: str) -> None:
    x, weight = torch.randn(2, 64, device=device), torch.ones(64, device=device)
    with refused(r"add_rms_norm_: residual of shape \[3, 64\]"):
        add_rms_norm_(x, torch.randn(3, 64, device=device), weight, 1e-6)
    with refused(r"add_rms_norm_: weight of shape \[8\] has D = 8, but x has D = 64"):
        add_rms_norm_(x, x.clone(), weight[:8], 1e-6)
    with refused("add_rms_norm_: residual must have .*dtype of x"):
        add_rms_norm_(x, x.double(), weight, 1e-6)
    with refused(r"add_rms_norm_: residual of shape \[1, 2, 64\]"):
        add_rms_norm_(x, x.clone()[None], weight, 1e-6)
    with refused("add_rms_norm_: x and residual are the same memory"):
        add_rms_norm_(x, x, weight, 1e-6)


def test_what_the_kernel_does_not_support(device: str) -> None:
    x = torch.ones(2, 20, device=device)
    with refused_by_kernels("add_rms_norm_", device, "D, the last dimension of x, is 20, .* a multiple of 8"):
        add_rms_norm_(x, x.clone(), x[0], 1e-6)
    with refused_by_kernels("add_rms_norm_", device, "residual must have every row at a multiple of 16 bytes"):
        add_rms_norm_(x[:, :8], x.clone()[:, 1:9], x[0, :8], 1e-6)
