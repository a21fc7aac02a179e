"""embedding against numpy's rows."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import numpy, refused
from conftest import Implementation

from pyllama.ops.embedding import embedding


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(7, 8, dtype=dtype), torch.tensor([3, 0, 6, 3])
    yield torch.randn(3, 16, dtype=dtype), torch.tensor([], dtype=torch.int64)


@pytest.mark.parametrize("T", [0, 1, 33])
@pytest.mark.parametrize(("V", "D"), [(1, 8), (50, 64), (9, 4104)])
def test_rows(V: int, D: int, T: int, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(V, D, dtype=dtype, device=device)
    ids = torch.randint(0, V, (T,), device=device)
    out = embedding(weight, ids)
    assert out.dtype == dtype
    assert out.is_contiguous()
    np.testing.assert_array_equal(numpy(out), numpy(weight)[ids.cpu().numpy()])


def test_token_outside_of_the_vocabulary(chosen: Implementation) -> None:
    weight = torch.randn(5, 8, device=chosen.device)
    if chosen.name == "eager":
        if chosen.device == "cpu":  # on a GPU, torch ends the process
            with pytest.raises(IndexError):
                embedding(weight, torch.tensor([5]))
        return
    ids = torch.tensor([1, 5, -1, 4], device=chosen.device)
    out = embedding(weight, ids)
    assert out[1:3].isnan().all()
    torch.testing.assert_close(out[[0, 3]], weight[[1, 4]])


def test_gradient_adds_up_what_a_token_got() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    embedding(weight, torch.tensor([2, 0, 2])).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([1.0, 0, 2, 0], dtype=torch.float64)[:, None].expand(4, 8))


def test_arguments(chosen: Implementation) -> None:
    weight = torch.randn(5, 8, device=chosen.device)
    ids = torch.tensor([1], device=chosen.device)
    with refused("embedding: token_ids must have .*int64"):
        embedding(weight, ids.int())
    with refused(r"embedding: token_ids must have shape \[T\]"):
        embedding(weight, ids[None])
    if chosen.name != "eager":
        with refused("embedding: D, the hidden size, is 6, but must be a multiple of 8"):
            embedding(weight[:, :6].contiguous(), ids)


def test_unaligned_weight(chosen: Implementation) -> None:
    """What a kernel would read in vectors must start where they do."""
    flat = torch.randn(41, device=chosen.device)
    weight, ids = flat[1:].view(5, 8), torch.tensor([4, 0], device=chosen.device)
    if chosen.name == "eager":
        torch.testing.assert_close(embedding(weight, ids), weight[ids])
    else:
        with refused("embedding: weight must start at a multiple of 16 bytes"):
            embedding(weight, ids)
