"""Timing: contenders in turns, over inputs that do not stay in the cache; medians.

On the GPU each contender is a CUDA graph, or is called in a loop where no graph can hold it; on the CPU it is called in
a loop and timed by the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch

Contender = Callable[[int], Any]  # runs once, on the inputs of that number
CPU_CACHE_BYTES, CPU_INPUT_BYTES = 64 * 2**20, 2**30


def sets_past_cache(touched: int, device: str, held: int = 0) -> int:
    """How many sets of inputs it takes until what a call touches of the first has left the cache (the GPU's L2).

    Of tiny ones at most 256 (on the CPU 16), which stay. touched, held: bytes of a set that a call moves, and that the
    set takes if those are more, such as the experts that no token chose; they bound what memory holds.
    """
    if device == "cpu":
        cache, memory, most = CPU_CACHE_BYTES, CPU_INPUT_BYTES, 16
    else:
        free_bytes, _ = torch.cuda.mem_get_info()
        cache, memory, most = 3 * torch.cuda.get_device_properties().L2_cache_size, free_bytes // 4, 256
    return max(1, min(cache // touched + 1, memory // max(touched, held), most))


@cache
def say(line: str) -> None:
    """Prints the line, once in a run: what fails in one case fails in many."""
    print(line, flush=True)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def seconds_per_call(
    contenders: dict[str, Contender], sets: int, device: str, called: Collection[str] = ()
) -> dict[str, float]:
    """Medians. A contender that raises gets no entry, and a line that says why.

    sets: how many numbered inputs there are. called: those that no CUDA graph can hold, since they read values on the
    host. Results stay alive until all sets had their turn, so that outputs too go through different memory.
    """
    rounds = 15 if device == "cuda" else 7
    timers: dict[str, Callable[[], float]] = {}
    for name, run in contenders.items():
        try:
            prepare = _loop if device == "cpu" else _call if name in called else _capture
            timers[name] = prepare(run, sets)
        except Exception as error:  # another library's; the others are still to be measured
            say(f"{name}: {reason(error)}")
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: statistics.median(values) for name, values in times.items()}


def _loop(run: Contender, sets: int) -> Callable[[], float]:
    """A timer of so many calls that the CPU is busy for two milliseconds."""
    for i in range(sets):
        run(i)
    start = time.perf_counter()
    run(0)
    calls = max(sets, min(1000, int(2e-3 / (time.perf_counter() - start))))
    results: list[Any] = [None] * sets

    def timer() -> float:
        start = time.perf_counter()
        for call in range(calls):
            results[call % sets] = run(call % sets)
        seconds = (time.perf_counter() - start) / calls
        results[:] = [None] * sets  # the next contender may need the memory
        return seconds

    return timer


def _capture(run: Contender, sets: int) -> Callable[[], float]:
    """A timer of a graph of so many calls that the GPU is busy for a millisecond."""
    calls = _enough(run, sets)
    results: list[Any] = [None] * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            results[call % sets] = run(call % sets)
    graph.replay()
    return lambda: _seconds(graph.replay) / calls


def _call(run: Contender, sets: int) -> Callable[[], float]:
    """A timer of as many calls without a graph: where the GPU waits for Python and for launches, that counts."""
    calls = _enough(run, sets)

    def several() -> None:
        results: list[Any] = [None] * sets
        for call in range(calls):
            results[call % sets] = run(call % sets)

    return lambda: _seconds(several) / calls


def _enough(run: Contender, sets: int) -> int:
    """How many calls keep the GPU busy for a millisecond; what the first ones compile and allocate is then there."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(min(3, sets)):
            run(i)
    torch.cuda.synchronize()
    estimate = max(_seconds(lambda: run(0)), 1e-6)
    return max(sets, min(1000, int(1e-3 / estimate) + 1))


def _seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead of the GPU
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
