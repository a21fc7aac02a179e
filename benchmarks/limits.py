"""What the device can do: a read-only stream, a copy, a large product. Benchmarks give shares of these.

    python -m benchmarks.limits [--output benchmarks/results]

prints them alone, by size. Needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import typer

from benchmarks.results import Results
from benchmarks.timing import seconds_per_call, sets_past_cache
from pyllama.bench.limits import Limit, product, read


def copy(moved: int, sets: int, device: str) -> Limit:
    """A copy that reads and writes so many bytes, half of them each."""
    half = max(moved // 2, 1)
    inputs = [torch.ones(half, dtype=torch.uint8, device=device) for _ in range(sets)]
    outputs = [torch.empty_like(x) for x in inputs]
    return Limit(2 * half, [lambda i: outputs[i % sets].copy_(inputs[i % sets])])


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
