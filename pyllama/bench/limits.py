"""What a device can do, measured: a read-only stream, and a large product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllama.cache import free_memory

READ_BYTES = 2**30  # larger than any cache
CALLS, ROUNDS = 8, 5


class Limit(NamedTuple):
    """Something that does nothing but what the limit is of: the fastest of several ways."""

    amount: int  # bytes or FLOP of one call
    ways: list[Callable[[int], Any]]  # each runs once, on the inputs of that number


class Limits(NamedTuple):
    bytes_per_second: float  # of a read-only stream
    flops_per_second: float  # of a large matrix product


def read(moved: int, sets: int, device: str) -> Limit:
    """A read-only stream of so many bytes, or a few more."""
    count = max(moved // 4, 1)
    blocks: list[int] = []
    if torch.device(device).type == "cuda" and find_spec("triton") is not None:
        from pyllama.bench import stream

        whole = stream.BLOCKS[0 if count < 16 * stream.BLOCKS[-1] else -1]
        count = -(-count // whole) * whole  # the stream reads whole blocks
        blocks = [block for block in stream.BLOCKS if block <= whole]
    inputs = [torch.ones(count, device=device) for _ in range(sets)]
    ways: list[Callable[[int], Any]] = [lambda i: inputs[i % sets].sum()]
    ways += [partial(_stream, inputs, block) for block in blocks]
    return Limit(4 * count, ways)


def _stream(inputs: list[Tensor], block: int, i: int) -> Tensor:
    from pyllama.bench import stream  # Triton is not everywhere

    return stream.read(inputs[i % len(inputs)], block)


def product(dtype: torch.dtype, device: str, n: int | None = None) -> Limit:
    """A product of two square matrices, by default large enough for the device's best."""
    n = n or (8192 if torch.device(device).type == "cuda" else 1024)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return Limit(2 * n**3, [lambda _: a @ b])


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """What the device reaches now, with products in `dtype`; takes seconds, and a GiB where that is free."""
    moved = int(min(READ_BYTES, free_memory(device) / 4))
    return Limits(*(_best(limit, device) for limit in (read(moved, 1, str(device)), product(dtype, str(device)))))


def _best(limit: Limit, device: torch.device) -> float:
    """Bytes or FLOP per second, of the fastest way at its fastest."""

    def seconds(way: Callable[[int], Any]) -> float:
        start = perf_counter()
        for call in range(CALLS):
            way(call)
        synchronize(device)
        return (perf_counter() - start) / CALLS

    for way in limit.ways:
        seconds(way)  # warms up
    return limit.amount / min(seconds(way) for way in limit.ways for _ in range(ROUNDS))


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU has to do; on a CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
