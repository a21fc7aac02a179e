"""moe_dispatch against a counting sort by hand."""

from collections.abc import Iterator

import pytest
import torch
from comparing import refused, refused_by_kernels

from pyllama.ops.moe_dispatch import moe_dispatch


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randint(8, (6, 2), dtype=torch.int32), 8


@pytest.mark.parametrize(
    ("T", "N", "E"),
    [(1, 1, 1), (1, 4, 32), (9, 2, 8), (0, 2, 4), (300, 8, 256), (5, 3, 64), (40, 32, 512), (2100, 8, 60)],
)
@pytest.mark.parametrize("spread", ["random", "one", "last"])
def test_counting_sort(T: int, N: int, E: int, spread: str, device: str) -> None:
    if spread == "random":
        indices = torch.rand(T, E).argsort(-1)[:, :N].int()  # distinct, as a router gives them
    else:
        indices = torch.full((T, N), 0 if spread == "one" else E - 1, dtype=torch.int32)
    owned: list[list[tuple[int, int]]] = [[] for _ in range(E)]
    for t in range(T):
        for n in range(N):
            owned[indices[t, n]].append((t, n))
    pairs = [pair for expert in owned for pair in expert]

    rows, offsets, positions = (x.cpu() for x in moe_dispatch(indices.to(device), E))
    assert rows.dtype == offsets.dtype == positions.dtype == torch.int32
    assert rows.tolist() == [t for t, _ in pairs]
    assert offsets.tolist() == [sum(map(len, owned[:e])) for e in range(E + 1)]
    assert positions.shape == (T, N)
    assert [positions[pair].item() for pair in pairs] == list(range(T * N))


def test_experts_that_are_not_there() -> None:
    """Only eager bodies read values."""
    for place in ((0, 0), (4, 1), (2, 0)):
        for wrong in (-1, 4, 2**31 - 1):
            indices = torch.randint(4, (5, 2), dtype=torch.int32)
            indices[place] = wrong
            with refused(f"moe_dispatch: indices has expert {wrong}, but must be in 0 to 3"):
                moe_dispatch(indices, 4)


def test_experts_that_kernels_do_not_take(device: str) -> None:
    with refused_by_kernels("moe_dispatch", device, "num_experts is 513, but must be in 1 to 512"):
        moe_dispatch(torch.zeros(2, 2, dtype=torch.int32, device=device), 513)
    with refused_by_kernels("moe_dispatch", device, "indices must be contiguous"):
        moe_dispatch(torch.zeros(2, 4, dtype=torch.int32, device=device)[:, :3], 4)


def test_arguments(device: str) -> None:
    with refused("moe_dispatch: indices must have .*int32"):
        moe_dispatch(torch.zeros(2, 2, dtype=torch.int64, device=device), 4)
    with refused("moe_dispatch: num_experts is 0"):
        moe_dispatch(torch.zeros(2, 2, dtype=torch.int32, device=device), 0)
