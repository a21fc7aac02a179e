"""What a cell of the table says: times, their share of what the device can do, memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pyllama.bench.engines import Timing
from pyllama.bench.limits import Limits
from pyllama.bench.work import Cell, Work


@dataclass(frozen=True)
class Figures:
    prompt_tokens_per_second: float  # of all sequences together, as are all rates
    first_token_seconds: float
    prompt_share: float  # of what the device can do
    tokens_per_second: float  # new ones, after the first
    step_seconds: float
    step_bytes: float  # that a step must read
    step_share: float
    peak_bytes: int | None  # None: the system does not say


@dataclass(frozen=True)
class Row:
    engine: str
    cell: Cell
    figures: Figures | None
    problem: str | None = None  # why there are no figures


def figures(
    cell: Cell, timings: Sequence[Timing], work: tuple[Work, Work], limits: Limits, peak_bytes: int | None
) -> Figures:
    prompt_seconds = median(timing.prompt_seconds for timing in timings)
    step_seconds = median(timing.generation_seconds for timing in timings) / (cell.new_tokens - 1)
    prompt_work, step_work = work
    return Figures(
        prompt_tokens_per_second=cell.batch * cell.context / prompt_seconds,
        first_token_seconds=prompt_seconds,
        prompt_share=prompt_work.seconds(limits) / prompt_seconds,
        tokens_per_second=cell.batch / step_seconds,
        step_seconds=step_seconds,
        step_bytes=step_work.bytes_read,
        step_share=step_work.seconds(limits) / step_seconds,
        peak_bytes=peak_bytes,
    )


def random_prompts(cell: Cell, vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (cell.batch, cell.context), generator=generator).tolist()


def reset_peak_memory(device: torch.device) -> bool:
    """Peaks count from here; False where the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None
