"""Every compiled kernel as torch sees it: `opcheck`, gradients, and a CUDA graph that is replayed on other inputs.

Emulated kernels go the same way, with a second call in place of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import Implementation
from emulated import EMULATOR
from torch import Tensor

from pyllama import _C
from pyllama.ops.registry import OPS, eager, implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test for every op with a kernel, on each implementation of this, in each data type."""
    emulator = metafunc.config.stash[EMULATOR]
    chosen = [(op, Implementation("cuda", "cuda"), ON_GPU) for op in _C.ops]
    if emulator:
        chosen += [(op, Implementation("emulated", "cpu", emulator, emulator.seeds[-1]), []) for op in emulator.ops]
    parameters = [
        pytest.param(op, kernels, dtype, id=f"{op}-{kernels}-{str(dtype)[6:]}", marks=marks)
        for op, kernels, marks in chosen
        for dtype in DTYPES
    ]
    metafunc.parametrize(("op", "kernels", "dtype"), parameters, indirect=["kernels"])


@pytest.fixture
def kernels(request: pytest.FixtureRequest, op: str) -> Iterator[Implementation]:
    """Inside, the op runs its kernel."""
    chosen: Implementation = request.param
    with chosen.active():
        assert implementation(op, chosen.device) == chosen.name
        yield chosen


Arguments = tuple[Any, ...]


def examples(op: str, dtype: torch.dtype, device: str, seed: int = 0) -> list[Arguments]:
    """The examples of arguments in the op's test file, moved to the device; with another seed, other values."""
    torch.manual_seed(seed)
    every = import_module(f"test_{op.rstrip('_')}").examples(dtype)
    return [tuple(a.to(device) if isinstance(a, Tensor) else a for a in args) for args in every]


def taken(op: str, args: Arguments) -> bool:
    """Whether the kernel takes arguments of these shapes: the eager bodies' examples may be smaller than any tile."""
    try:
        OPS[op].function(*copy.deepcopy(args))
    except ValueError:
        return False
    return True


def results(op: str, args: Arguments) -> list[Tensor]:
    """What a call gives, and what its arguments then hold."""
    out = OPS[op].function(*args)
    made = out if isinstance(out, tuple) else () if out is None else (out,)
    return [*made, *(a for a in args if isinstance(a, Tensor))]


def recorded(op: str, args: Arguments, device: str) -> tuple[list[Tensor], Callable[[], None]]:
    """The tensors of `results`, and a function that computes them again from what the arguments then hold."""
    if device == "cpu":
        out = results(op, args)

        def call() -> None:
            for static, new in zip(out, results(op, args), strict=True):
                static.copy_(new)

        return out, call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once, as loading a kernel, may not happen in the capture
        results(op, copy.deepcopy(args))
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = results(op, args)
    return out, graph.replay


def test_replay_on_other_inputs(op: str, kernels: Implementation, dtype: torch.dtype) -> None:
    """Bit for bit what a direct call gives: nothing of the inputs that were there at capture remains."""
    replayed = 0
    cases = zip(*(examples(op, dtype, kernels.device, seed) for seed in (0, 1, 2)), strict=True)
    with torch.inference_mode():
        for first, *others in cases:
            if not taken(op, first):
                continue
            static, replay = recorded(op, first, kernels.device)
            for args in others:
                for to, new in zip(first, args, strict=True):
                    if isinstance(new, Tensor):
                        to.copy_(new)
                    else:
                        assert to == new
                replay()
                torch.testing.assert_close(static, results(op, args), rtol=0, atol=0, equal_nan=True)
                replayed += 1
    assert replayed, "the kernel takes none of the examples: add one to the op's test file"


def test_opcheck(op: str, kernels: Implementation, dtype: torch.dtype) -> None:
    """Schema, autograd, fake results and torch.compile agree with what the kernel does."""
    checked = 0
    for args in examples(op, dtype, kernels.device):
        if taken(op, args):
            torch.library.opcheck(OPS[op].overload, args)
            checked += 1
    assert checked, "the kernel takes none of the examples: add one to the op's test file"


def test_gradients_behind_kernels(op: str, kernels: Implementation, dtype: torch.dtype) -> None:
    """The forward is the kernel's, bit for bit; the gradients are those of the body in float64, which `gradcheck` holds
    against finite differences (test_registry.py)."""
    if not OPS[op].differentiable:
        return
    checked = 0
    names = [argument.name for argument in OPS[op].overload._schema.arguments]
    for args in examples(op, dtype, kernels.device):
        if not taken(op, args):
            continue
        floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        leaves = [i for i in floats if names[i] != "cos_sin"]  # which is float32, whatever the others are
        narrow, wide = list(args), list(args)
        for i in leaves:
            narrow[i] = args[i].detach().clone().requires_grad_()
            wide[i] = args[i].double().requires_grad_()
        out = floating(OPS[op].function(*narrow))
        with torch.no_grad():
            torch.testing.assert_close(out, floating(OPS[op].function(*args)), rtol=0, atol=0)
        grads = [torch.randn_like(x) for x in out]
        found = torch.autograd.grad(out, [narrow[i] for i in leaves], grads)
        with bodies(kernels):
            expected = floating(OPS[op].function(*wide))
            right = torch.autograd.grad(expected, [wide[i] for i in leaves], [grad.double() for grad in grads])
        for got, wanted in zip(found, right, strict=True):
            tolerance = (8 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
            assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
        checked += 1
    assert checked, "the kernel takes none of the examples: add one to the op's test file"


@contextmanager
def bodies(kernels: Implementation) -> Iterator[None]:
    """Inside, every op runs its eager body again."""
    with eager():
        if kernels.emulator:
            kernels.emulator.module.disable("CPU")
        try:
            yield
        finally:
            if kernels.emulator:
                kernels.emulator.module.enable("CPU")


def floating(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x.is_floating_point()]
