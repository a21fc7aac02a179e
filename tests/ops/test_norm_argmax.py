"""norm_argmax_ against the largest of float64 logits, and against norm_linear's."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import numpy, refused, refused_by_kernels
from test_norm_linear import normalised
from torch import Tensor

from pyllama.ops.norm_argmax import norm_argmax_
from pyllama.ops.norm_linear import norm_linear

NONE = -(2**40)  # what tokens are at first, and what no token is


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    norm, weight = 1 + 0.1 * torch.randn(16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    counters = torch.zeros(8, dtype=torch.int32)
    yield torch.full((3,), NONE), torch.randn(3, 16, dtype=dtype), norm, 1e-5, weight, counters, True
    yield torch.full((2,), NONE), torch.randn(2, 16, dtype=dtype), None, 0.0, weight


def chosen(x: Tensor, norm: Tensor | None, weight: Tensor, counters: Tensor | None = None, early: bool = False) -> list:
    tokens = torch.full((len(x),), NONE, device=x.device)
    norm_argmax_(tokens, x, norm, 1e-5, weight, counters, early)
    return tokens.tolist()


def whole_numbers(most: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randint(-most, most + 1, shape, device=device).to(dtype)


SHAPES = [(0, 64, 8), (1, 8, 1), (1, 2048, 33), (3, 264, 40), (8, 512, 16), (9, 72, 130), (16, 136, 50), (16, 16, 4099)]


@pytest.mark.parametrize(("T", "D", "V"), SHAPES)
def test_the_largest_and_of_equals_the_first(T: int, D: int, V: int, dtype: torch.dtype, device: str) -> None:
    """Whole numbers, whose sums are exact, in a few values, so that many are equal."""
    x, weight = (whole_numbers(1, n, D, dtype=dtype, device=device) for n in (T, V))
    logits = numpy(x) @ numpy(weight).T
    assert dtype.itemsize > 2 or abs(logits).max(initial=0) <= 256  # bfloat16 has these
    assert chosen(x, None, weight) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("T", "D", "V"), [(1, 2048, 100), (5, 4104, 33), (16, 72, 1000)])
@pytest.mark.parametrize("early", [False, True])
def test_formula(T: int, D: int, V: int, early: bool, dtype: torch.dtype, device: str) -> None:
    x, norm = 100 * torch.randn(T, D, dtype=dtype, device=device), 1 + 0.1 * torch.randn(D, dtype=dtype, device=device)
    weight = torch.randn(V, D, dtype=dtype, device=device)
    normed = normalised(numpy(x), numpy(norm), 1e-5)
    logits = normed @ numpy(weight).T
    tokens = chosen(x, norm, weight, early=early)
    # Each of the two compared is off by the roundings of what is normalised, of the sum, and of the result.
    roundings = torch.finfo(dtype).eps * ((np.abs(normed) @ np.abs(numpy(weight)).T).max(-1) + np.abs(logits).max(-1))
    assert (logits[range(T), tokens] >= logits.max(-1) - roundings).all()


def test_the_choice_is_among_rounded_logits(dtype: torch.dtype, device: str) -> None:
    """As norm_linear gives them, so that log-probabilities and the choice go together."""
    x, weight = torch.ones(2, 16, dtype=dtype, device=device), torch.zeros(20, 16, dtype=dtype, device=device)
    weight[3, 0] = weight[17, 0] = 256
    weight[17, 1] = 0.5  # 256.5 is 256 in bfloat16
    assert chosen(x, None, weight) == [3 if dtype == torch.bfloat16 else 17] * 2
    x, weight = torch.randn(16, 264, dtype=dtype, device=device), torch.randn(4099, 264, dtype=dtype, device=device)
    norm = torch.ones(264, dtype=dtype, device=device)
    assert chosen(x, norm, weight) == norm_linear(x, norm, 1e-5, weight).argmax(-1).tolist()


def test_every_row_of_the_weight_is_looked_at(dtype: torch.dtype, device: str) -> None:
    x, weight = torch.ones(1, 8, dtype=dtype, device=device), -torch.ones(50, 8, dtype=dtype, device=device)
    for row in range(50):
        weight[row] *= 0.5
        assert chosen(x, None, weight) == [row]
        weight[row] *= 4


def test_nan_is_above_all(dtype: torch.dtype, device: str) -> None:
    """As in torch, whatever its sign; and a token of NaN does not touch the others."""
    x, weight = torch.ones(9, 16, dtype=dtype, device=device), torch.zeros(40, 16, dtype=dtype, device=device)
    weight[7] = float("inf")
    weight[21, 3], weight[30, 3] = -float("nan"), float("nan")
    assert chosen(x, None, weight) == [21] * 9
    weight[21:31] = 0
    x[4] = float("nan")
    assert chosen(x, None, weight) == [7] * 4 + [0] + [7] * 4


def test_strided_rows(dtype: torch.dtype, device: str) -> None:
    x = torch.full((5, 320), float("nan"), dtype=dtype, device=device)
    x[:, 64:192] = whole_numbers(1, 5, 128, dtype=dtype, device=device)
    weight = whole_numbers(1, 40, 128, dtype=dtype, device=device)
    assert chosen(x[:, 64:192], None, weight) == (numpy(x[:, 64:192]) @ numpy(weight).T).argmax(-1).tolist()


def test_counters_are_left_as_they_were(dtype: torch.dtype, device: str) -> None:
    """So that one tensor serves all calls."""
    counters = torch.zeros(34, dtype=torch.int32, device=device)
    for T in (16, 1, 3):
        x, weight = (
            whole_numbers(1, T, 64, dtype=dtype, device=device),
            whole_numbers(1, 90, 64, dtype=dtype, device=device),
        )
        assert chosen(x, None, weight, counters, early=True) == (numpy(x) @ numpy(weight).T).argmax(-1).tolist()
        assert not counters.any()


def test_what_the_kernel_does_not_support(device: str) -> None:
    x, weight = torch.randn(2, 16, device=device), torch.randn(8, 16, device=device)
    with refused_by_kernels("norm_argmax_", device, "T, the number of tokens, is 17, but must be at most 16"):
        chosen(torch.randn(17, 16, device=device), None, weight)
    with refused_by_kernels("norm_argmax_", device, "D, the features of x, are 12, but must be a multiple of 8"):
        chosen(torch.randn(2, 12, device=device), None, weight[:, :12].contiguous())
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    with refused_by_kernels("norm_argmax_", device, "counters has 4 elements, but must have at least 5"):
        chosen(x, None, weight, counters[:4])
    with refused_by_kernels("norm_argmax_", device, "counters must begin at a multiple of 8 bytes"):
        chosen(x, None, weight, counters[1:])
    with refused_by_kernels("norm_argmax_", device, "tokens must be contiguous"):
        norm_argmax_(torch.zeros(4, dtype=torch.int64, device=device)[::2], x, None, 0.0, weight)


def test_arguments(device: str) -> None:
    x, weight = torch.randn(2, 16, device=device), torch.randn(8, 16, device=device)
    with refused("norm_argmax_: tokens must have .*int64"):
        norm_argmax_(torch.zeros(2, dtype=torch.int32, device=device), x, None, 0.0, weight)
    with refused(r"norm_argmax_: .* has T = "):
        norm_argmax_(torch.zeros(3, dtype=torch.int64, device=device), x, None, 0.0, weight)
    with refused(r"norm_argmax_: weight of shape \[8, 8\] has D = 8, but x has D = 16"):
        chosen(x, None, weight[:, :8])
    with refused("norm_argmax_: weight has no rows, but must have the vocabulary's"):
        chosen(x, None, weight[:0])
