"""What the GPU can do: a read-only stream, a copy, a bfloat16 product. Other benchmarks give shares of these.

python benchmarks/limits.py [--output benchmarks/results]
"""

import argparse
from pathlib import Path

import torch
import triton
import triton.language as tl
from results import Results
from timing import seconds_per_call, sets_past_l2
from torch import Tensor


@triton.jit
def _sum_of_blocks(x_ptr, sum_ptr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at)))


def read(x: Tensor, block: int) -> Tensor:
    """Reads all of x, float32, in blocks, and writes one number for each."""
    sums = x.new_empty(x.numel() // block)
    _sum_of_blocks[(len(sums),)](x, sums, block=block, num_warps=8)
    return sums


def bandwidth(results: Results, mebibytes: int) -> None:
    size = mebibytes * 2**20
    sets = sets_past_l2(size)
    inputs = [torch.ones(size // 4, device="cuda") for _ in range(sets)]
    outputs = [torch.empty_like(x) for x in inputs[: sets_past_l2(2 * size)]]
    blocks = (4096, 8192, 16384)
    assert read(inputs[0], 8192).sum().item() == size // 4
    seconds = seconds_per_call(
        {f"read {block}": lambda i, block=block: read(inputs[i], block) for block in blocks}
        | {"read by torch": lambda i: inputs[i].sum(), "copy": lambda i: outputs[i % len(outputs)].copy_(inputs[i])},
        sets,
    )
    fastest = min(time for name, time in seconds.items() if name.startswith("read"))
    results.add(limit="read", size=f"{mebibytes} MiB", us=round(fastest * 1e6, 2), gb_per_s=round(size / fastest / 1e9))
    copy = seconds["copy"]
    results.add(limit="copy", size=f"{mebibytes} MiB", us=round(copy * 1e6, 2), gb_per_s=round(2 * size / copy / 1e9))


def product(results: Results, n: int) -> None:
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device="cuda")
    seconds = seconds_per_call({"product": lambda _: a @ b}, 1)["product"]
    results.add(
        limit="product", size=f"{n}^3", us=round(seconds * 1e6, 2), tflop_per_s=round(2 * n**3 / seconds / 1e12)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    results = Results(parser.parse_args().output / "limits.jsonl")
    for mebibytes in (16, 64, 256, 1024, 4096):
        bandwidth(results, mebibytes)
    for n in (4096, 8192, 16384):
        product(results, n)
    results.show("Limits: GB/s read, or read and written; product in bfloat16")


if __name__ == "__main__":
    main()
