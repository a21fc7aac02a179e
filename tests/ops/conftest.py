"""What every test of an op shares: the implementations to run on, and memory that starts out as NaN."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from pyllama import _C
from pyllama.ops.registry import OPS, eager, implementation


class Implementation(NamedTuple):
    name: str  # as pyllama.ops.implementation says it
    device: str


IMPLEMENTATIONS = [Implementation("eager", "cpu")]
if torch.cuda.is_available():
    IMPLEMENTATIONS += [Implementation("eager", "cuda"), Implementation("cuda", "cuda")]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda chosen: f"{chosen.name}-{chosen.device}")
def chosen(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """One implementation of the op that the test's file is named after; inside, the op runs on it."""
    stem = request.path.stem.removeprefix("test_")
    name = next(name for name in OPS if name.rstrip("_") == stem)
    chosen: Implementation = request.param
    if chosen.name != "eager" and name not in _C.ops:
        pytest.skip(f"{name} has no compiled kernel")
    with eager() if chosen.name == "eager" else nullcontext():
        assert implementation(name, chosen.device) == chosen.name
        yield chosen


@pytest.fixture
def device(chosen: Implementation) -> str:
    return chosen.device


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def dtype(chosen: Implementation, request: pytest.FixtureRequest) -> torch.dtype:
    if chosen.name != "eager" and request.param is torch.float64:
        pytest.skip("kernels have no float64")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty return NaN (integers: the largest), so that results left unwritten do not pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
