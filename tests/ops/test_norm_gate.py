"""norm_gate against RMSNorm and a router written as loops, in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparing import assert_close, numpy, refused, refused_by_kernels
from test_norm_linear import normalised
from test_topk_gate import ROUTERS, reference

from pyllama.ops.norm_gate import norm_gate


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    norm, weight = 1 + 0.1 * torch.randn(16, dtype=dtype), torch.randn(8, 16, dtype=dtype)
    yield torch.randn(3, 16, dtype=dtype), norm, 1e-5, weight, 2
    bias, counters = torch.randn(8, dtype=torch.promote_types(dtype, torch.float32)), torch.zeros(4, dtype=torch.int32)
    options = (2, bias, "sigmoid", (4, 2, 2), True, 2.5, counters, True)
    yield torch.randn(2, 16, dtype=dtype), norm, 1e-5, weight, *options


def check(T: int, D: int, E: int, dtype: torch.dtype, device: str, **options: Any) -> None:
    x, norm = torch.randn(T, D, dtype=dtype, device=device), 1 + 0.1 * torch.randn(D, dtype=dtype, device=device)
    weight = 2 * torch.randn(E, D, dtype=dtype, device=device) / D**0.5
    normed, weights, indices = norm_gate(x, norm, 1e-5, weight, **options)
    assert_close(normed, normalised(numpy(x), numpy(norm), 1e-5))
    logits = numpy(normed) @ numpy(weight).T  # of what was rounded, so that near ties are decided alike
    router = {name: value for name, value in options.items() if name not in ("counters", "early")}
    if router.get("bias") is not None:
        router["bias"] = numpy(router["bias"])
    expected, chosen = reference(logits, **router)
    assert indices.dtype == torch.int32
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert indices.tolist() == chosen.tolist()
    assert_close(weights, expected)


@pytest.mark.parametrize(("T", "D"), [(0, 64), (1, 2048), (5, 72), (9, 520), (16, 64)])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_formula(router: dict[str, Any], T: int, D: int, dtype: torch.dtype, device: str) -> None:
    bias = 0.3 * torch.randn(32, device=device) if router.get("bias") else None
    check(T, D, 32, dtype, device, **router | {"bias": bias})


@pytest.mark.parametrize(("E", "top_k", "groups"), [(1, 1, None), (33, 5, None), (384, 8, None), (512, 32, (8, 4, 2))])
def test_numbers_of_experts(E: int, top_k: int, groups: Any, dtype: torch.dtype, device: str) -> None:
    check(3, 128, E, dtype, device, top_k=top_k, **{} if groups is None else {"groups": groups})


def test_counters_are_left_as_they_were(dtype: torch.dtype, device: str) -> None:
    """So that one tensor serves all calls."""
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    for _ in range(3):
        check(2, 64, 40, dtype, device, top_k=4, counters=counters, early=True)
        assert not counters.any()


def test_what_the_kernel_does_not_support(device: str) -> None:
    norm, weight = torch.ones(16, device=device), torch.randn(4, 16, device=device)
    with refused_by_kernels("norm_gate", device, "T, the number of tokens, is 17, but must be at most 16"):
        norm_gate(torch.randn(17, 16, device=device), norm, 1e-5, weight, 2)
    with refused_by_kernels("norm_gate", device, "counters has 0 elements, but must have at least 1"):
        none = torch.zeros(0, dtype=torch.int32, device=device)
        norm_gate(torch.randn(1, 16, device=device), norm, 1e-5, weight, 2, counters=none)
    with refused_by_kernels("norm_gate", device, "counters must be contiguous"):
        apart = torch.zeros(4, dtype=torch.int32, device=device)[::2]
        norm_gate(torch.randn(1, 16, device=device), norm, 1e-5, weight, 2, counters=apart)


def test_arguments(device: str) -> None:
    x, norm, weight = (torch.randn(*shape, device=device) for shape in ((2, 16), (16,), (4, 16)))
    with refused("norm_gate: counters must have .*int32"):
        norm_gate(x, norm, 1e-5, weight, 2, counters=torch.zeros(1, dtype=torch.int8, device=device))
    with refused("norm_gate: top_k is 5, but must be in 1 to 4"):
        norm_gate(x, norm, 1e-5, weight, 5)
    with refused("norm_gate: scoring is 'relu'"):
        norm_gate(x, norm, 1e-5, weight, 2, scoring="relu")
    with refused(r"norm_gate: groups\[0\] is 3, but must divide the number of experts E = 4"):
        norm_gate(x, norm, 1e-5, weight, 2, groups=(3, 1, 1))
    with refused("norm_gate: weight of shape .* has D = 8, but x has D = 16"):
        norm_gate(x, norm, 1e-5, weight[:, :8], 2)
