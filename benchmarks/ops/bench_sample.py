"""sample beside torch and, where it is installed, flashinfer.

    python benchmarks/ops/bench_sample.py [--output benchmarks/results]

The limit is one read of as many bytes as the logits have, in the same run. Ratios are other time / pyllama's time.
Logits are normal with a spread of 4, which leaves a few likely tokens, as a model does; of 1, which leaves thousands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from limits import read
from results import Results
from timing import Contender, seconds_per_call, sets_past_l2

from pyllama.ops.registry import eager, implementation
from pyllama.ops.sample import sample

VOCABULARIES = [32000, 128256, 151936]
BATCHES = [1, 16, 64]
BLOCK = 1024  # of the reading kernel, in float32


class Options(NamedTuple):
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def tensors(self, B: int) -> dict[str, Tensor]:
        dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        given = {
            name: torch.full((B,), value, dtype=dtypes[name], device="cuda") for name, value in self._asdict().items()
        }
        counting = torch.arange(B, device="cuda")
        return {**given, "seed": counting, "step": torch.zeros_like(counting)}


OPTIONS = {
    "greedy": Options(temperature=0.0),
    "temperature": Options(),
    "top_k": Options(top_k=50),
    "top_p": Options(top_p=0.9),
    "min_p": Options(min_p=0.05),
    "top_k_top_p": Options(top_k=50, top_p=0.9),
}


def formula(logits: Tensor, options: Options) -> Tensor:
    """The same in torch, filters by sorting; the draw is multinomial's, without its look at the values on the host."""
    if options.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / options.temperature
    if options.top_k:
        scores = scores.masked_fill(scores < scores.topk(options.top_k).values[:, -1:], float("-inf"))
    if options.top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        likely = ordered.softmax(-1)
        dropped = likely.cumsum(-1) - likely >= options.top_p
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    probabilities = scores.softmax(-1)
    if options.min_p:
        probabilities = probabilities * (probabilities >= options.min_p * probabilities.amax(-1, keepdim=True))
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def flashinfer_sampler(flashinfer: ModuleType, options: Options) -> Callable[[Tensor], Tensor] | None:
    """flashinfer's function for the options: from logits to tokens."""
    _, k, p, min_p = options

    def probabilities(logits: Tensor) -> Tensor:
        return torch.softmax(logits.float() / options.temperature, -1)

    if options.temperature == 0:
        return None
    if k and p < 1:
        return lambda x: flashinfer.top_k_top_p_sampling_from_probs(
            probabilities(x), k, p, filter_apply_order="top_k_first"
        )
    if k:
        return lambda x: flashinfer.top_k_sampling_from_probs(probabilities(x), k)
    if p < 1:
        return lambda x: flashinfer.top_p_sampling_from_probs(probabilities(x), p)
    if min_p:
        return lambda x: flashinfer.min_p_sampling_from_probs(probabilities(x), min_p)
    return lambda x: flashinfer.sampling_from_logits(x.float() / options.temperature)


def bench(results: Results, B: int, V: int, name: str, spread: float, flashinfer: ModuleType | None) -> None:
    options, dtype = OPTIONS[name], torch.bfloat16
    size = B * V * dtype.itemsize
    sets = sets_past_l2(size)
    logits = [(spread * torch.randn(B, V, device="cuda")).to(dtype) for _ in range(sets)]
    blocks = -(-size // (4 * BLOCK))
    same_bytes = [torch.ones(blocks * BLOCK, device="cuda") for _ in range(sets)]
    tensors = options.tensors(B)

    torch._dynamo.reset()
    compiled = torch.compile(formula, dynamic=False)
    contenders: dict[str, Contender] = {
        "pyllama": lambda i: sample(logits[i], **tensors),
        "read": lambda i: read(same_bytes[i], BLOCK),
        "torch": lambda i: formula(logits[i], options),
        "compile": lambda i: compiled(logits[i], options),
    }
    if flashinfer and (sampler := flashinfer_sampler(flashinfer, options)):
        contenders["flashinfer"] = lambda i: sampler(logits[i])
    seconds = seconds_per_call(contenders, sets)

    tokens = [sample(x, **tensors) for x in logits]
    with eager():
        equal = [(ours == sample(x, **tensors)).float().mean() for ours, x in zip(tokens, logits, strict=True)]
    ours = seconds["pyllama"]
    results.add(
        op="sample",
        dtype=str(dtype).removeprefix("torch."),
        shape=f"{B}x{V}",
        options=name,
        spread=spread,
        us=round(ours * 1e6, 2),
        gb_per_s=round(size / ours / 1e9),
        of_read=round(seconds["read"] / ours, 3),
        **{f"{other}/ours": round(seconds[other] / ours, 2) for other in seconds if other not in ("pyllama", "read")},
        as_eager=round(torch.stack(equal).mean().item(), 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results")
    results = Results(parser.parse_args().output / "sample.jsonl")
    assert implementation("sample", "cuda") == "cuda", "pyllama was built without nvcc"
    flashinfer = None
    try:
        flashinfer = import_module("flashinfer.sampling")
    except ImportError:
        print("flashinfer: not installed")
    for V in VOCABULARIES:
        for B in BATCHES:
            for name in OPTIONS:
                bench(results, B, V, name, 4.0, flashinfer)
    for name in ("temperature", "top_k", "top_p"):
        bench(results, 1, 128256, name, 1.0, flashinfer)
    results.show("sample; of_read: time of one read of the same bytes / ours; as_eager: share of equal tokens")


if __name__ == "__main__":
    main()
