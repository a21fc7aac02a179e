"""Where the time of a step goes: a trace for chrome://tracing or Perfetto, and a table of kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from pyllama.bench.limits import Limits, synchronize
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.step import Decoding

WARM_STEPS, STEPS = 4, 8
SMALL = 0.001  # kernels of less than this share of the step are one line of the table
# Ops that read the whole of every tensor they are given, so that their inputs' shapes say how many bytes. Of other
# ops' inputs (caches, experts, an embedding) it depends on values what is read.
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"})
OF_FEW_TOKENS = frozenset(
    f"pyllama::{op}" for op in ("norm_linear", "norm_swiglu", "linear_add_", "norm_gate", "norm_argmax_")
)


@dataclass
class Kernel:
    """What all its calls take together."""

    calls: int = 0
    seconds: float = 0.0
    product_bytes: float = 0.0  # read by those of its calls that belong to products,
    product_seconds: float = 0.0  # which take so long


def write_profile(model: Model, prompts: Sequence[list[int]], limits: Limits, folder: Path) -> None:
    """Profiles some steps of generation after the prompts: trace.json and kernels.md in the folder, which is made.

    Steps are launched kernel by kernel: those that a CUDA graph launches belong to no op, so that nobody knows what
    they read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new_tokens = 1 + WARM_STEPS + STEPS
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    decoding = Decoding(model, prompts, [new_tokens] * len(prompts), params, ahead=0, graphs=False)
    for _ in range(1 + WARM_STEPS):
        decoding.step()
    synchronize(model.device)
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = perf_counter()
        for _ in range(STEPS):
            decoding.step()
        synchronize(model.device)
        seconds = perf_counter() - start
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = list(profiler.events() or ())
    kernels = (of_gpu if cuda else of_cpu)(events, model.dtype.itemsize)
    title = f"A step of generation: batch {len(prompts)}, context {len(prompts[0])}, mean of {STEPS}, "
    title += "launched kernel by kernel and profiled"
    if cuda:
        title += ". Kernels overlap, and the time of each is counted with its waiting for the one ahead"
    (folder / "kernels.md").write_text("\n".join([title, "", *table(kernels, seconds, limits, cuda)]) + "\n")


def of_gpu(events: Iterable[Any], itemsize: int) -> dict[str, Kernel]:
    """The GPU's kernels and copies by name. Of those that belong to no op, as a CUDA graph's, no bytes are known."""
    kernels: dict[str, Kernel] = defaultdict(Kernel)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].calls += 1
            kernels[event.name].seconds += event.time_range.elapsed_us() / 1e6
        elif event.name in PRODUCTS | OF_FEW_TOKENS and event.kernels:
            launched = max(event.kernels, key=lambda kernel: kernel.duration)  # a second one adds up its parts
            kernels[launched.name].product_bytes += _bytes_read(event, itemsize)
            kernels[launched.name].product_seconds += launched.duration / 1e6
    return kernels


def of_cpu(events: Iterable[Any], itemsize: int) -> dict[str, Kernel]:
    """The ops by name, each without those that it calls."""
    kernels: dict[str, Kernel] = defaultdict(Kernel)
    for event in events:
        if "::" not in event.name:
            continue
        kernel, seconds = kernels[event.name], event.self_cpu_time_total / 1e6
        kernel.calls += 1
        kernel.seconds += seconds
        if event.name in PRODUCTS:
            kernel.product_bytes += _bytes_read(event, itemsize)
            kernel.product_seconds += seconds
    return kernels


def table(kernels: dict[str, Kernel], seconds: float, limits: Limits, gpu: bool) -> list[str]:
    """Markdown's lines, the slowest kernel first, and at the end what no kernel takes of `seconds`, all steps' time."""
    lines = [
        "| kernel | calls/step | us/step | of the step | of limit |",
        "|---|---:|---:|---:|---:|",
    ]

    def add(name: str, calls: str, taken: float, share: str = "") -> None:
        lines.append(f"| {name} | {calls} | {taken / STEPS * 1e6:.1f} | {taken / seconds:.1%} | {share} |")

    small = [kernel for kernel in kernels.values() if kernel.seconds < SMALL * seconds]
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].seconds):
        if kernel.seconds >= SMALL * seconds:
            least = kernel.product_bytes / limits.bytes_per_second
            share = f"{least / kernel.product_seconds:.0%}" if kernel.product_seconds else ""
            add(
                f"`{name if len(name) <= 90 else name[:87] + '...'}`",
                f"{kernel.calls / STEPS:g}",
                kernel.seconds,
                share,
            )
    add(f"{len(small)} more", f"{sum(k.calls for k in small) / STEPS:g}", sum(k.seconds for k in small))
    rest = seconds - sum(kernel.seconds for kernel in kernels.values())
    add("the GPU waits" if gpu else "Python, and between ops", "", rest)
    add("the step", "", seconds)
    return [
        *lines,
        "",
        f"of limit: bytes of a product's inputs / its time, as a share of {limits.bytes_per_second / 1e9:,.1f} GB/s, "
        "the read-only stream measured in this run; blank where what an op reads depends on values.",
    ]


def _bytes_read(event: Any, itemsize: int) -> int:
    """Of the tensors among the op's first five inputs, in the model's data type; what linear_add_ has after these is
    not read, only brought to a cache."""
    return sum(prod(shape) * itemsize for shape in event.input_shapes[:5] if shape)
