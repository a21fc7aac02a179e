"""CUDA graphs, and what they ask of a batch's state.

A graph does again what was recorded, on the memory where it was recorded. So the state of a batch stays where it is:
sequences that leave are overwritten in place, and there are a few numbers of places, some of which may be unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

# How many places a batch may have: all small numbers, then four for each doubling, so at most a quarter is unused.
PLACES = (*range(1, 8), *(quarters << shift for shift in range(1, 9) for quarters in (4, 5, 6, 7)))

# torch captures one graph at a time in a process. What comes between is not recorded, but may use the same stream.
_capturing = Lock()


def places_for(sequences: int) -> int:
    """The fewest places that hold so many sequences; beyond the largest number, exactly as many."""
    return next((places for places in PLACES if places >= sequences), sequences)


def keep_rows(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """`x[rows]` in place of the first rows of x, [rows, ...], which is returned; rows: int64, on x's device.

    dim: which of x's dimensions the rows are.
    """
    return x.narrow(dim, 0, len(rows)).copy_(x.index_select(dim, rows))


class Runner(Protocol):
    """How the stages of a step are run."""

    def __call__(self, stage: str, work: Callable[[], R]) -> R: ...


def directly(stage: str, work: Callable[[], R]) -> R:
    """Without graphs."""
    return work()


class Graphs:
    """Runs each stage as it is the first time, captures it the second, and from then on replays it.

    So a stage must be the same work each time: on tensors that stay where they are, reading none of them on the host,
    or on what an earlier stage returned. What a captured stage returns also stays where it is, and each replay writes
    it anew. All stages share one pool of memory, which is free again when this object is gone. Raises ValueError for a
    device without graphs.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"graphs run on a CUDA device, but the model is on {device}; use graphs=False")
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stages: dict[str, tuple[torch.cuda.CUDAGraph, Any] | None] = {}

    def __call__(self, stage: str, work: Callable[[], R]) -> R:
        if stage not in self._stages:
            self._stages[stage] = None
            return work()  # this loads kernels and fills tables, which a capture may not do
        captured = self._stages[stage] or self._capture(work)
        self._stages[stage] = captured
        graph, result = captured
        graph.replay()
        return result

    def _capture(self, work: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self._device):
            torch.cuda.current_blas_handle()  # this thread's, which a capture may not make
            stream = _capture_stream(self._device)
            # The current stream is entered, as a capture that fails would not bring it back. thread_local: other
            # threads may launch and allocate meanwhile (to synchronise the whole device would end the capture).
            with (
                _own_workspaces(),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
            ):
                result = work()
        return graph, result


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Inside, cuBLAS takes new workspaces, and others again afterwards.

    torch keeps them by stream. So a graph would share one with all that were captured before, in the memory of the
    first, and lose it with that (pytorch issue 193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, since cuBLAS keeps a workspace for every stream it has met."""
    return torch.cuda.Stream(device)
