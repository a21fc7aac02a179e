"""What the device can do: a read-only stream, a copy, a large product. Benchmarks give shares of these.

    python -m benchmarks.limits [--output benchmarks/results]

prints them alone, by size. Needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import typer

from benchmarks.results import Results
from benchmarks.timing import Contender, seconds_per_call, sets_past_cache


class Limit(NamedTuple):
    """Something that does nothing but what the limit is of: the fastest of several ways."""

    amount: int  # bytes or FLOP of one call
    ways: list[Contender]


def read(moved: int, sets: int, device: str) -> Limit:
    """A read-only stream of so many bytes, or a few more."""
    count = max(moved // 4, 1)
    blocks: list[int] = []
    if device == "cuda":
        from benchmarks import stream

        whole = stream.BLOCKS[0 if count < 16 * stream.BLOCKS[-1] else -1]
        count = -(-count // whole) * whole  # the stream reads whole blocks
        blocks = [block for block in stream.BLOCKS if block <= whole]
    inputs = [torch.ones(count, device=device) for _ in range(sets)]
    ways: list[Contender] = [lambda i: inputs[i % sets].sum()]
    ways += [lambda i, block=block: stream.read(inputs[i % sets], block) for block in blocks]
    return Limit(4 * count, ways)


def copy(moved: int, sets: int, device: str) -> Limit:
    """A copy that reads and writes so many bytes, half of them each."""
    half = max(moved // 2, 1)
    inputs = [torch.ones(half, dtype=torch.uint8, device=device) for _ in range(sets)]
    outputs = [torch.empty_like(x) for x in inputs]
    return Limit(2 * half, [lambda i: outputs[i % sets].copy_(inputs[i % sets])])


def product(dtype: torch.dtype, device: str, n: int | None = None) -> Limit:
    """A product of two square matrices, by default large enough for the device's best."""
    n = n or (8192 if device == "cuda" else 1024)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return Limit(2 * n**3, [lambda _: a @ b])


def measured(limit: Limit, sets: int, device: str) -> float:
    """Bytes or FLOP per second."""
    contenders = {f"limit {i}": way for i, way in enumerate(limit.ways)}
    return limit.amount / min(seconds_per_call(contenders, sets, device).values())


def main(output: Path = Path(__file__).parent / "results") -> None:
    if not torch.cuda.is_available():
        raise SystemExit("limits: no GPU here")
    results = Results(output / "limits.jsonl")

    def add(name: str, size: str, limit: Limit, sets: int) -> None:
        rate, unit = measured(limit, sets, "cuda"), "TFLOP/s" if name == "product" else "GB/s"
        scale = 1e12 if name == "product" else 1e9
        results.add(limit=name, size=size, us=round(limit.amount / rate * 1e6, 2), rate=round(rate / scale), unit=unit)

    memory: dict[str, Callable[[int, int, str], Limit]] = {"read": read, "copy": copy}
    for mebibytes in (16, 64, 256, 1024, 4096):
        for name, make in memory.items():
            sets = sets_past_cache(mebibytes * 2**20, "cuda")
            add(name, f"{mebibytes} MiB", make(mebibytes * 2**20, sets, "cuda"), sets)
    for n in (4096, 8192, 16384):
        add("product", f"{n}^3", product(torch.bfloat16, "cuda", n), 1)
    results.show("Limits: bytes read, bytes read and written, product in bfloat16")


if __name__ == "__main__":
    typer.run(main)
