"""Comparison with float64 references, and the reference that three ops share."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from pyllama.ops.registry import implementation


def assert_close(
    actual: Tensor, expected: Tensor | np.ndarray, roundings: float = 1.0, rounded_within: float = 0.0
) -> None:
    """`actual` is the float64 result, computed in float32 (float64: in float64) and rounded once to its type.

    Per element one rounding of the type, plus 64 roundings of the type computed in, of the largest element (sums).
    roundings: multiplies the first part. rounded_within: the size of what is rounded to the type on the way, which is
    allowed for besides.
    """
    expected = torch.as_tensor(expected)
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape
    compute = torch.promote_types(actual.dtype, torch.float32)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(
        actual.detach().cpu().double(),
        expected,
        rtol=roundings * torch.finfo(actual.dtype).eps / (1 if actual.dtype == compute else 2) * 1.01,
        atol=64 * torch.finfo(compute).eps * max(largest, torch.finfo(actual.dtype).tiny) + rounded_within * rounding,
    )


def rounded_weights(implementation: str, values: Tensor) -> float:
    """What `rounded_within` is for attention: tensor cores take weights, at most 1, in the values' type."""
    kernel = implementation != "eager" and values.dtype.itemsize == 2
    return values.abs().max().item() if kernel and values.numel() else 0.0


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def int32(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def bounds(lengths: list[int], device: str = "cpu") -> Tensor:
    """Cumulative lengths, from 0."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def attention_of_sequence(
    q_nHK: np.ndarray, k_mGK: np.ndarray, v_mGV: np.ndarray, scale: float, window: int | None = None
) -> np.ndarray:
    """Causal attention of one sequence's last n queries over its m keys, query by query, in float64."""
    n, H, _ = q_nHK.shape
    m, G, V = v_mGV.shape
    out = np.zeros((n, H, V))
    for i in range(n):
        last = m - n + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(H):
            if last < 0:
                continue
            g = h * G // H
            scores = k_mGK[first : last + 1, g] @ q_nHK[i, h] * scale
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v_mGV[first : last + 1, g] / weights.sum()
    return out


def refused(message: str) -> AbstractContextManager[object]:
    """Bad arguments raise ValueError, in eager bodies and in kernels. message: a regular expression."""
    return pytest.raises(ValueError, match=message)


def refused_by_kernels(op: str, device: str, message: str) -> AbstractContextManager[object]:
    """What eager bodies do and kernels raise ValueError for."""
    return nullcontext() if implementation(op, device) == "eager" else refused(f"{op}: {message}")


def numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()
