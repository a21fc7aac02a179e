"""What every test of an op shares: the implementations to run on, and memory that starts out as NaN."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
from emulated import EMULATOR, Emulator

from pyllama import _C
from pyllama.ops.registry import OPS, eager, implementation


class Implementation(NamedTuple):
    name: str  # as pyllama.ops.implementation says it
    device: str
    emulator: Emulator | None = None
    seed: int = 0  # of the emulated threads' schedule

    def __str__(self) -> str:
        return f"{self.name}-{self.device}" + (f"-{self.seed}" if self.emulator else "")

    def active(self) -> AbstractContextManager[None]:
        """Inside, ops on the device run this implementation."""
        if self.emulator:
            return self.emulator.enabled(self.seed)
        return eager() if self.name == "eager" else nullcontext()


def op_of(stem: str) -> str | None:
    """The op that a test's file is named after."""
    return next((name for name in OPS if name.rstrip("_") == stem), None)


def implementations(op: str, emulator: Emulator | None) -> Iterator[Implementation]:
    yield Implementation("eager", "cpu")
    if emulator and op in emulator.ops:
        yield from (Implementation("emulated", "cpu", emulator, seed) for seed in emulator.seeds)
    if torch.cuda.is_available():
        yield Implementation("eager", "cuda")
        if op in _C.ops:
            yield Implementation("cuda", "cuda")


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # float64: of eager bodies alone


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `chosen` (or `device`) on every implementation of its op, one that takes `dtype` with
    every data type that this has, unless it names its own."""
    op = op_of(metafunc.module.__name__.removeprefix("test_"))
    if op is None or "chosen" not in metafunc.fixturenames:
        return
    every = list(implementations(op, metafunc.config.stash[EMULATOR]))
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "dtype" not in metafunc.fixturenames or any("dtype" in names for names in named):
        metafunc.parametrize("chosen", every, ids=str, indirect=True)
        return
    pairs = [(chosen, dtype) for chosen in every for dtype in DTYPES if chosen.name == "eager" or dtype.itemsize < 8]
    ids = [f"{chosen}-{str(dtype)[6:]}" for chosen, dtype in pairs]
    metafunc.parametrize(("chosen", "dtype"), pairs, ids=ids, indirect=["chosen"])


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """One implementation of the op that the test's file is named after; inside, the op runs on it."""
    chosen: Implementation = request.param
    with chosen.active():
        op = op_of(request.path.stem.removeprefix("test_"))
        assert op is not None
        assert implementation(op, chosen.device) == chosen.name
        yield chosen


@pytest.fixture
def device(chosen: Implementation) -> str:
    return chosen.device


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes torch.empty return NaN (integers: the largest), so that results left unwritten do not pass."""
    torch.manual_seed(request.config.getoption("--seed"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
