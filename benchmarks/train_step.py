"""Forward and backward of a training step: pyllama, with layers computed twice, compiled, and transformers beside it.

    python -m benchmarks.train_step [--shape qwen3-0.6b] [--layers 4] [--batch 4] [--context 512] [--rounds 5]

Random weights of a well-known model's shape, the same for all; in turns, after a first time that does not count. The
losses must agree, since they are of the same step. Medians of tokens/s; on a GPU also the peak memory above the
weights. The optimizer, which is torch's for all, is not part of it.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from benchmarks.results import Results
from pyllama.architectures import read_config
from pyllama.bench.engines import random_model
from pyllama.bench.limits import synchronize
from pyllama.bench.shapes import find_shape, first_layers
from pyllama.model import Model
from pyllama.save import Origin

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Step = Callable[[Tensor], Tensor]  # token ids -> loss, with gradients


def contenders(model: Model, values: dict[str, Any], compiled: bool) -> dict[str, tuple[nn.Module, Step]]:
    """By name: whose parameters have gradients afterwards, and what gives the loss."""
    found: dict[str, tuple[nn.Module, Step]] = {
        "pyllama": (model, lambda ids: model(ids, ids).loss),
        "pyllama, layers twice": (model, lambda ids: model(ids, ids, activation_checkpointing=True).loss),
    }
    if compiled:
        whole = torch.compile(model)
        found["pyllama, compiled"] = model, lambda ids: whole(ids, ids).loss
    if find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        model.origin = Origin(values, None)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model")
            other = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=model.dtype).to(model.device)
        routed = {"output_router_logits": True} if hasattr(other.config, "router_aux_loss_coef") else {}
        found["transformers"] = other, lambda ids: other(ids, labels=ids, use_cache=False, **routed).loss
    return found


def measure(owner: nn.Module, step: Step, token_ids: Tensor) -> tuple[float, float, int]:
    """Seconds, loss, and on a GPU the bytes at the peak above those before."""
    owner.zero_grad(set_to_none=True)
    gc.collect()
    cuda = token_ids.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    synchronize(token_ids.device)
    start = perf_counter()
    loss = step(token_ids)
    loss.backward()
    synchronize(token_ids.device)
    seconds = perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    owner.zero_grad(set_to_none=True)
    return seconds, loss.item(), peak


def main(
    shape: Annotated[str, typer.Option(help="A well-known model's, as for `pyllama bench`.")] = "qwen3-0.6b",
    layers: Annotated[int | None, typer.Option(min=1, help="The first ones only.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Whose median counts.")] = 5,
    compiled: Annotated[bool, typer.Option(help="With torch.compile, which takes its time first.")] = True,
    output: Path = Path(__file__).parent / "results",
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = find_shape(shape)
    values = whole if layers is None else first_layers(whole, layers)
    model = random_model(read_config(values)[0], device, dtype).train()
    token_ids = torch.randint(model.config.vocab_size, (batch, context), device=device)
    engines = contenders(model, values, compiled)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for measured in track(range(-1, rounds), description=shape):  # round -1 warms up
        for name, (owner, step) in engines.items():
            taken, losses[name], peaks[name] = measure(owner, step, token_ids)
            if measured >= 0:
                seconds[name].append(taken)
    results = Results(output / "train_step.jsonl")
    ours = statistics.median(seconds["pyllama"])
    for name, taken in seconds.items():
        if abs(losses[name] - losses["pyllama"]) > LOSS_TOLERANCE[dtype] * losses["pyllama"]:
            raise SystemExit(f"{name} has the loss {losses[name]}, pyllama {losses['pyllama']}: not the same step")
        median = statistics.median(taken)
        results.add(
            shape=shape,
            layers=len(model.config.layers),
            batch=batch,
            context=context,
            engine=name,
            tokens_per_second=round(batch * context / median, 1),
            ratio=round(median / ours, 3),
            peak_gb=round(peaks[name] / 1e9, 3) if peaks[name] else None,
            loss=round(losses[name], 5),
            rounds=rounds,
            threads=torch.get_num_threads(),
        )
    results.show(f"forward and backward, {dtype}; ratio: time over pyllama's")


if __name__ == "__main__":
    typer.run(main)
