"""A stand-in for CUDA graphs on the CPU: what torch was asked to do, done again on the memory where it was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pyllama.step import Decoding

# Work that a graph cannot hold: it reads the device on the host, or brings something from there.
ON_HOST = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::lift_fresh", "aten::_to_copy"}


class Borrowed:
    """A tensor in memory that is not the graph's: it must still be there when the graph is replayed."""

    def __init__(self, x: Tensor) -> None:
        self.storage = StorageWeakRef(x.untyped_storage())
        self.dtype, self.view = x.dtype, (x.storage_offset(), x.size(), x.stride())

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "a graph reads memory that is no longer there"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class Recorder(TorchDispatchMode):
    """Inside, every call of an operator is noted, its own memory with it and other memory by reference only."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self.own: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.name() not in ON_HOST, f"{function.name()} in a graph"
        taken = tree_map_only(Tensor, self._held, (args, kwargs or {}))
        given = function(*args, **(kwargs or {}))
        self.own |= memory_of(given) - memory_of((args, kwargs))
        self.calls.append((function, taken, tree_map_only(Tensor, self._held, given)))
        return given

    def _held(self, x: Tensor) -> Tensor | Borrowed:
        return x if x.untyped_storage()._cdata in self.own else Borrowed(x)

    def replay(self) -> None:
        for function, taken, given in self.calls:
            args, kwargs = tree_map_only(Borrowed, Borrowed.tensor, taken)
            new = tensors(function(*args, **kwargs))
            for to, x in zip(tensors(tree_map_only(Borrowed, Borrowed.tensor, given)), new, strict=True):
                if to.data_ptr() != x.data_ptr():
                    to.copy_(x)


def memory_of(tree: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors(tree)}


def tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


class Recorded:
    """As `pyllama.graphs.Graphs`; a stage that is recorded has run already, and is not replayed for that."""

    def __init__(self, device: torch.device) -> None:
        self._stages: dict[str, tuple[Recorder, Any] | None] = {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        if stage not in self._stages:
            self._stages[stage] = None
            return work()
        if self._stages[stage] is None:
            with Recorder() as recorder:
                self._stages[stage] = recorder, work()
            result = self._stages[stage][1]
        else:
            recorder, result = self._stages[stage]
            recorder.replay()
        return result


ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Way(NamedTuple):
    """How steps are run; without one of these, each is read before the next begins, and nothing is replayed."""

    device: str
    ahead: int
    graphs: bool

    def decoding(self, *args: Any, **options: Any) -> Decoding:
        return Decoding(*args, **options, ahead=self.ahead, graphs=self.graphs)


WAYS = [
    pytest.param(Way(device, ahead, replayed), marks=marks, id=f"{device}-{ahead}{'-graphs' if replayed else ''}")
    for device, marks in (("cpu", []), ("cuda", ON_GPU))
    for ahead, replayed in ((0, True), (1, False), (1, True), (2, True))
]
