"""rope against rotation of complex numbers in float64, and against transformers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_close, int32, numpy, refused, refused_by_kernels
from torch import Tensor

from pyllama.ops.rope import rope


def table(positions: int, R: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(0, R, 2) / R)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(3, 2, 16, dtype=dtype), table(20, 16), int32(3, 0, 19)
    yield torch.randn(3, 2, 24, dtype=dtype), table(20, 16), int32(3, 0, 19), True


def reference(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> np.ndarray:
    x_THK, rows, R = numpy(x), numpy(cos_sin), cos_sin.shape[1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + R // 2) for i in range(R // 2)]
    out = x_THK.copy()
    for t, position in enumerate(positions.tolist()):
        for i, (a, b) in enumerate(pairs):
            turned = (x_THK[t, :, a] + 1j * x_THK[t, :, b]) * (rows[position, i] + 1j * rows[position, R // 2 + i])
            out[t, :, a], out[t, :, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("T", "heads", "K", "R"),
    [
        *[(1, 4, 64, 64), (5, 3, 128, 64), (0, 2, 64, 64), (33, 1, 80, 32)],
        # an odd number of vectors, more heads than a block has, several tokens to a block, nothing rotated
        *[(7, 2, 72, 48), (2, 40, 256, 256), (70, 2, 32, 16), (3, 5, 8, 0), (150, 1, 8, 0)],
    ],
)
def test_formula(T: int, heads: int, K: int, R: int, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(T, heads, K, dtype=dtype, device=device)
    cos_sin, positions = table(100, R).to(device), torch.randint(100, (T,), dtype=torch.int32, device=device)
    out = rope(x, cos_sin, positions, interleaved)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, reference(x, cos_sin, positions, interleaved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_heads(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 6, 64, dtype=dtype, device=device)[:, 1:4]
    cos_sin, positions = table(9, 64).to(device), int32(8, 7, 6, 0, 0, device=device)
    assert_close(rope(x, cos_sin, positions), reference(x, cos_sin, positions, False))


def test_what_the_kernel_does_not_support(device: str) -> None:
    x, positions = torch.ones(2, 3, 64, device=device), int32(0, 1, device=device)
    for K in (60, 264):
        with refused_by_kernels("rope", device, f"K, the head size, is {K}, .* a multiple of 8 from 8 to 256"):
            rope(torch.ones(2, 3, K, device=device), table(9, 16).to(device), positions)
    with refused_by_kernels("rope", device, "cos_sin's last dimension R is 24, .* a multiple of 16"):
        rope(x, table(9, 24).to(device), positions)
    with refused_by_kernels("rope", device, "x must have every row at a multiple of 16 bytes"):
        rope(x[:, :, 1:17], table(9, 16).to(device), positions)


def test_agrees_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 7, 4, 32, dtype=torch.float64)
    cos_sin, positions = table(50, 32), torch.randint(50, (7,), dtype=torch.int32)
    cos, sin = (half.double().repeat(1, 2) for half in cos_sin[positions].chunk(2, dim=-1))
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    torch.testing.assert_close((rope(q, cos_sin, positions), rope(k, cos_sin, positions)), expected)


def test_arguments(device: str) -> None:
    x, positions = torch.randn(2, 3, 64, device=device), int32(0, 1, device=device)
    with refused("rope: cos_sin.* R is 128"):
        rope(x, table(9, 128).to(device), positions)
    with refused("rope: cos_sin.* R is 7"):
        rope(x, table(9, 8)[:, :7].to(device), positions)
    with refused(r"rope: positions of shape \[1\] has T = 1, but x has T = 2"):
        rope(x, table(9, 64).to(device), positions[:1])
    with refused("rope: positions must have .*int32"):
        rope(x, table(9, 64).to(device), positions.long())
    with refused("rope: cos_sin must have .*float32"):
        rope(x, table(9, 64).to(device).bfloat16(), positions)
