"""What a step of decoding takes with and without what was chosen for it, in microseconds of the device.

    python -m benchmarks.choices [--config tests/configs/Llama-3.2-1B-Instruct] [--layers 4]

A random model of a real one's size writes greedily after prompts of 16 tokens; medians over steps, on a GPU from event
to event around a step's work (see `host_cost`), on a CPU from one step to the next. products: with torch's products in
place of the ops for few tokens, which serve up to `pyllama.layers.linear.FEW`. no prefetch: with nothing brought to the
L2 cache by output products.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import pyllama
from benchmarks.host_cost import PROMPT_TOKENS, WARM_UP, device_microseconds, host_microseconds, replaced
from benchmarks.model_check import CONFIG, cut_down, random_model
from benchmarks.results import Results
from pyllama.architectures import read_config
from pyllama.layers import linear
from pyllama.model import Model


def without_prefetch(op: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, prefetch: object, **options: Any) -> None:
        op(*args, **options)

    return call


CHOICES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as chosen": nullcontext,
    "products": lambda: replaced(linear, "FEW", lambda few: 0),
    "no prefetch": lambda: replaced(linear, "linear_add_", without_prefetch),
}


def measure(model: Model, batch: int, steps: int) -> dict[str, float]:
    """Microseconds of a step by choice."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()

    def write() -> None:
        pyllama.generate(model, prompts, max_new_tokens=WARM_UP + steps, ignore_eos=True)

    taken = {}
    for name, choice in CHOICES.items():
        with choice():
            write()
            gpu = model.device.type == "cuda"
            taken[name] = device_microseconds(write) if gpu else host_microseconds(write)["step"]
    return taken


def main(
    config: Annotated[Path, typer.Option(help="folder with a config.json")] = CONFIG,
    layers: Annotated[int | None, typer.Option(min=1, help="how many are kept")] = None,
    steps: Annotated[int, typer.Option(min=2)] = 100,
    batch: Annotated[list[int], typer.Option(min=1)] = [1, 2, 4, 8, 12, 16],  # noqa: B006  typer takes lists only
    output: Path = Path(__file__).parent / "results",
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    read, _ = read_config(json.loads((config / "config.json").read_text()))
    model = random_model(cut_down(read, 0, layers, None), device, torch.bfloat16)
    results = Results(output / "choices.jsonl")
    for sequences in batch:
        taken = {f"{name}_us": round(us, 1) for name, us in measure(model, sequences, steps).items()}
        results.add(model=config.name, layers=len(model.layers), batch=sequences, **taken, steps=steps)
    results.show("us of a step, medians")


if __name__ == "__main__":
    typer.run(main)
