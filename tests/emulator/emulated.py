"""The kernels on the CPU: loads the library that CMakeLists.txt beside this file builds, and enables its kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

BUILD = Path(__file__).parents[2] / "build" / "emulator"
EMULATOR = pytest.StashKey["Emulator | None"]()  # where a test run keeps the one it was given
SCHEDULES = {"plain": 4, "asan": 2, "tsan": 1}  # of each flavour, how many a test runs under


def runs(tensor: Tensor) -> Iterator[Tensor]:
    """The parts of a tensor that lie end to end."""
    if tensor.is_contiguous():
        yield tensor
    else:
        for part in tensor:
            yield from runs(part)


@dataclass(frozen=True)
class Emulator:
    """The emulated kernels of one flavour: plain, or instrumented by a sanitizer."""

    flavour: str
    build: Path = BUILD

    @property
    def path(self) -> Path:
        return self.build / self.flavour / "_C.so"

    @property
    def seeds(self) -> list[int]:
        """Schedules to run under: 0 is the order of the threads' numbers, the others are random and repeat."""
        first = 1 if self.flavour == "tsan" else 0
        return list(range(first, first + SCHEDULES[self.flavour]))

    @cached_property
    def module(self) -> ModuleType:
        """pyllama._C with CPU kernels. Loaded once a process: every load would enter its ops again."""
        spec = importlib.util.spec_from_file_location("_C", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def ops(self) -> tuple[str, ...]:
        return self.module.ops  # type: ignore[no-any-return]

    @property
    def prefetches(self) -> tuple[int, int]:
        """How many lines of 128 bytes the last launch brought to the L2 cache, and the sum of their addresses."""
        found = (ctypes.c_uint64 * 2)()
        ctypes.CDLL(str(self.path)).emulator_prefetches(found)
        return found[0], found[1]

    @contextmanager
    def overlapping(self) -> Iterator[Callable[[], int]]:
        """Inside, launches that may overlap the kernels before them do so in ThreadSanitizer's eyes. Gives a function
        that tells how many there were."""
        library = ctypes.CDLL(str(self.path))
        library.emulator_overlap(ctypes.c_bool(True))
        try:
            yield lambda: int(library.emulator_overlap(ctypes.c_bool(True)))
        finally:
            library.emulator_overlap(ctypes.c_bool(False))

    def touch(self, tensors: Iterable[Tensor]) -> None:
        """Runs a kernel that writes the tensors' elements; they stay as they are."""
        parts = [run for tensor in tensors for run in runs(tensor)]
        starts = (ctypes.c_void_p * len(parts))(*(run.data_ptr() for run in parts))
        sizes = (ctypes.c_size_t * len(parts))(*(run.nbytes for run in parts))
        ctypes.CDLL(str(self.path)).emulator_touch(starts, sizes, ctypes.c_size_t(len(parts)))

    @contextmanager
    def enabled(self, seed: int) -> Iterator[None]:
        """Inside, CPU tensors meet the kernels, whose threads run in the order that `seed` gives."""
        ctypes.CDLL(str(self.path)).emulator_seed(ctypes.c_uint64(seed))
        self.module.enable("CPU")
        try:
            yield
        finally:
            self.module.disable("CPU")
