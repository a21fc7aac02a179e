"""The product of linear layers: the same numbers whichever library multiplies, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyllama.layers.linear import Linear
from pyllama.ops.product import pays, product


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("features", [1, 6, 7, 48, 1536])
@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 513])
def test_against_float64(tokens: int, features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    wide = torch.randn(tokens, 40, dtype=dtype)
    weight, bias = torch.randn(features, 20, dtype=dtype), torch.randn(features, dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for x in (wide[:, :20], wide[:, ::2]):  # rows apart, and no element beside the next
        exact = x.double() @ weight.double().T
        for w in (weight, weight.T.contiguous().T):
            with torch.inference_mode():
                torch.testing.assert_close(product(x, w).double(), exact, **tolerance)
                torch.testing.assert_close(product(x, w, bias).double(), exact + bias.double(), **tolerance)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_and_compile(tokens: int) -> None:
    layer = Linear(20, 6)
    x = torch.randn(tokens, 20, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(6, 20))
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(tokens, 20))
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "D", "features"), [(1, 2000, 1001), (513, 204, 1000)])
def test_large_products(tokens: int, D: int, features: int) -> None:
    """So large that another library takes them over."""
    assert pays(tokens, D * features)
    torch.manual_seed(tokens)
    wide, weight, bias = torch.randn(tokens, 2 * D), torch.randn(features, D), torch.randn(features)
    for x in (wide[:, :D], wide[:, ::2]):
        exact = x.double() @ weight.double().T + bias.double()
        with torch.inference_mode():
            torch.testing.assert_close(product(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-3)
