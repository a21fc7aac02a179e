"""rms_norm beside torch and, where they are installed, other libraries' kernels.

    python benchmarks/ops/bench_rms_norm.py [--output benchmarks/results]

The limit is a copy of x, of the same bytes, in the same run. Ratios are other time / pyllama's time.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from results import Results
from timing import Contender, seconds_per_call, sets_past_l2

from pyllama.ops.registry import implementation
from pyllama.ops.rms_norm import rms_norm

EPS = 1e-5
PEERS = {  # function(x, weight, eps=)
    "liger": ("liger_kernel.transformers.functional", "liger_rms_norm"),
    "flashinfer": ("flashinfer.norm", "rmsnorm"),
    "quack": ("quack", "rmsnorm"),
}
SHAPES = [(1, 4096), (64, 4096), (1024, 4096), (4096, 4096), (16384, 4096), (4096, 8192), (4096, 16384)]
HEADS = [(64, 128), (32 * 1024, 128), (32 * 16384, 128)]  # query/key normalisation: tokens * heads


def formula(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def peers() -> dict[str, object]:
    found = {}
    for name, (module, function) in PEERS.items():
        try:
            found[name] = getattr(import_module(module), function)
        except ImportError:
            print(f"{name}: not installed")
    return found


def bench(results: Results, rows: int, columns: int, dtype: torch.dtype, libraries: dict[str, object]) -> None:
    moved = 2 * rows * columns * dtype.itemsize
    sets = sets_past_l2(moved)
    x = [torch.randn(rows, columns, dtype=dtype, device="cuda") for _ in range(sets)]
    y = [torch.empty_like(x[0]) for _ in range(sets)]
    weight = torch.randn(columns, dtype=dtype, device="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(formula, dynamic=False)
    contenders: dict[str, Contender] = {
        "pyllama": lambda i: rms_norm(x[i], weight, EPS),
        "copy": lambda i: y[i].copy_(x[i]),
        "torch": lambda i: F.rms_norm(x[i], (columns,), weight, EPS),
        "compile": lambda i: compiled(x[i], weight),
    }
    for name, function in libraries.items():
        contenders[name] = lambda i, function=function: function(x[i], weight, eps=EPS)
    seconds = seconds_per_call(contenders, sets)

    expected = x[0].double() / (x[0].double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    error = (rms_norm(x[0], weight, EPS).double() - expected).abs().max() / expected.abs().max()
    ours = seconds["pyllama"]
    results.add(
        op="rms_norm",
        dtype=str(dtype).removeprefix("torch."),
        shape=f"{rows}x{columns}",
        us=round(ours * 1e6, 2),
        gb_per_s=round((moved + columns * dtype.itemsize) / ours / 1e9),
        of_copy=round(seconds["copy"] / ours, 3),
        **{f"{name}/ours": round(seconds[name] / ours, 2) for name in seconds if name not in ("pyllama", "copy")},
        error=f"{error.item():.1e}",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    results = Results(parser.parse_args().output / "rms_norm.jsonl")
    assert implementation("rms_norm", "cuda") == "cuda", "pyllama was built without nvcc"
    libraries = peers()
    for rows, columns in SHAPES + HEADS:
        bench(results, rows, columns, torch.bfloat16, libraries)
    bench(results, 4096, 4096, torch.float16, libraries)
    bench(results, 4096, 4096, torch.float32, libraries)
    results.show("rms_norm; of_copy: time of a copy of the same bytes / ours")


if __name__ == "__main__":
    main()
