"""Timing on the GPU: contenders in turns, each as a CUDA graph, over inputs that do not stay in the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Contender = Callable[[int], Any]  # runs once, on the inputs of that number


def sets_past_l2(bytes_per_set: int) -> int:
    """How many sets of inputs it takes until the first has left the L2 cache; of tiny ones at most 256, which stay."""
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    free_bytes, _ = torch.cuda.mem_get_info()
    return max(1, min(3 * l2_bytes // bytes_per_set + 1, free_bytes // 4 // bytes_per_set, 256))


def seconds_per_call(contenders: dict[str, Contender], sets: int, rounds: int = 15) -> dict[str, float]:
    """Medians. A contender that raises gets no entry, and a line that says why.

    sets: how many numbered inputs there are. Results stay alive until all sets had their turn, so that outputs too
    go through different memory.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, run in contenders.items():
        try:
            graphs[name] = _capture(run, sets)
        except Exception as error:  # another library's; the others are still to be measured
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            times[name].append(_seconds(graph.replay) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(run: Contender, sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of so many calls that the GPU is busy for a millisecond, and their number."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and allocates what the first calls need
        for i in range(min(3, sets)):
            run(i)
    torch.cuda.synchronize()
    estimate = max(_seconds(lambda: run(0)), 1e-6)
    calls = max(sets, min(1000, int(1e-3 / estimate) + 1))
    results: list[Any] = [None] * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            results[call % sets] = run(call % sets)
    graph.replay()
    return graph, calls


def _seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead of the GPU
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
