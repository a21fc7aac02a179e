"""What `pyllama doctor` finds: versions, the build, GPUs, which implementation each op has, and advice."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pyllama import _C
from pyllama.ops.registry import OPS, implementation

PACKAGES = ("pyllama", "torch", "tokenizers", "safetensors", "huggingface_hub", "jinja2")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class GPU:
    device: str  # "cuda:0", ...
    name: str
    capability: str  # "9.0", ...
    memory_bytes: int
    supported: bool  # this build's kernels run on it


@dataclass(frozen=True)
class Report:
    versions: dict[str, str]
    cuda_of_torch: str | None  # None: a CPU-only torch
    cuda_of_build: str | None  # None: built without nvcc, so without kernels
    architectures: tuple[str, ...]
    compiled_ops: tuple[str, ...]
    driver: str | None  # of NVIDIA's kernel module; None: none is loaded
    gpus: list[GPU]
    ops: dict[str, dict[str, str]]  # op -> device -> "cuda", "emulated" or "eager"
    advice: list[str]  # what to do about what is off; empty when nothing is


def examine() -> Report:
    """Looks at this process and this machine; changes neither."""
    driver = _driver()
    gpus = _gpus()
    ops = {
        name: {"cpu": implementation(name, "cpu")}
        | {gpu.device: implementation(name, gpu.device) if gpu.supported else "eager" for gpu in gpus}
        for name in sorted(OPS)
    }
    return Report(
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        cuda_of_torch=torch.version.cuda,
        cuda_of_build=_C.cuda_version,
        architectures=_C.architectures,
        compiled_ops=_C.ops,
        driver=driver,
        gpus=gpus,
        ops=ops,
        advice=_advice(driver, torch.version.cuda, _C.cuda_version, _C.architectures, gpus, ops),
    )


def _advice(
    driver: str | None,
    cuda_of_torch: str | None,
    cuda_of_build: str | None,
    architectures: tuple[str, ...],
    gpus: list[GPU],
    ops: dict[str, dict[str, str]],
) -> list[str]:
    lines = []
    if driver and cuda_of_torch is None:
        lines.append("this torch is CPU-only, so the GPU stays unused: install a CUDA build of torch (pytorch.org)")
    elif driver and not gpus:
        lines.append(
            f"driver {driver} is loaded, but torch finds no GPU: either the driver is too old for torch's CUDA "
            f"{cuda_of_torch} (`nvidia-smi` shows the newest it serves), or CUDA_VISIBLE_DEVICES hides the GPUs"
        )
    if gpus and cuda_of_build is None:
        lines.append(
            "pyllama was built without nvcc, so all ops run eagerly on the GPU: put nvcc on the PATH and install again"
        )
    for gpu in gpus:
        if cuda_of_build is not None and not gpu.supported:
            lines.append(
                f"{gpu.device} has compute capability {gpu.capability}, and this build's kernels are for "
                f"{', '.join(architectures)}: build on this machine with "
                "`pip install . -C cmake.define.PYLLAMA_ARCHITECTURES=native`"
            )
        eager = [name for name, devices in ops.items() if devices[gpu.device] == "eager"]
        if gpu.supported and eager:
            lines.append(f"{gpu.device} runs {len(eager)} of {len(ops)} ops eagerly, slower: {', '.join(eager)}")
    return lines


def _gpus() -> list[GPU]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        supported = _C.cuda_version is not None and _C.supports(major, minor)
        found.append(GPU(f"cuda:{index}", properties.name, f"{major}.{minor}", properties.total_memory, supported))
    return found


def show(report: Report, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts, "")
    devices = ["cpu", *(gpu.device for gpu in report.gpus)]
    table = Table("op", *devices, box=None, header_style="bold")
    for op, implementations in report.ops.items():
        table.add_row(op, *(implementations[device] for device in devices))
    console.print(table, "")
    for line in report.advice:
        console.print(f"[yellow]![/] {line}")
    if not report.advice:
        console.print("[green]everything is in order[/]")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield from report.versions.items()
    yield "torch's CUDA", report.cuda_of_torch or "none (a CPU-only torch)"
    if report.cuda_of_build is None:
        yield "kernels", "none (built without nvcc)"
    else:
        count, targets = len(report.compiled_ops), ", ".join(report.architectures)
        yield "kernels", f"{count} of {len(report.ops)} ops, CUDA {report.cuda_of_build}, {targets}"
    yield "NVIDIA driver", report.driver or "none"
    for gpu in report.gpus:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        yield gpu.device, f"{gpu.name}, compute capability {gpu.capability}, {memory}"
    if not report.gpus:
        yield "GPUs", "none found: models run on the CPU"


def _driver() -> str | None:
    if not DRIVER_FILE.is_file():
        return None
    match = re.search(r"Kernel Module\D*(\d[\d.]+)", DRIVER_FILE.read_text())
    return match[1] if match else "of unknown version"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
