"""Prefill and decode tokens/s on the CPU, beside transformers on the same random weights, in float32.

    python -m benchmarks.cpu_generate [--shape dense|moe] [--rounds 5] [--output benchmarks/results]

Both engines generate greedily from the same token ids, in turns within one process, and must write the same
tokens. A prefill is a generation of one token; decode is what the further tokens take on top. Medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import pyllama
from benchmarks.results import Results

COMMON = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_hidden_layers=12, intermediate_size=3072)),
    "moe": lambda: MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            num_hidden_layers=10,
            intermediate_size=512,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=None,
        )
    ),
}


def seconds(run: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SHAPES)}; default: all")] = None,
    prompt_tokens: int = 256,
    new_tokens: int = 33,
    rounds: int = 5,
    output: Path = Path(__file__).parent / "results",
) -> None:
    results = Results(output / "cpu_generate.jsonl")
    for name in shape or SHAPES:
        torch.manual_seed(0)
        reference = SHAPES[name]().eval()
        with tempfile.TemporaryDirectory() as folder:
            reference.save_pretrained(folder)
            model = pyllama.load(folder, device="cpu", dtype="float32")
        prompt = torch.randint(0, COMMON["vocab_size"], (prompt_tokens,)).tolist()

        def ours(tokens: int, model: pyllama.Model = model, prompt: list[int] = prompt) -> list[int]:
            return pyllama.generate(model, prompt, max_new_tokens=tokens, ignore_eos=True).token_ids

        def theirs(tokens: int, model: PreTrainedModel = reference, prompt: list[int] = prompt) -> list[int]:
            out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
            return out[0, len(prompt) :].tolist()

        engines = {"pyllama": ours, "transformers": theirs}
        prefill: dict[str, list[float]] = {engine: [] for engine in engines}
        decode: dict[str, list[float]] = {engine: [] for engine in engines}
        for measured in track(range(-1, rounds), description=name):  # round -1 warms up
            written = {}
            for engine, run in engines.items():
                first, _ = seconds(lambda run=run: run(1))
                whole, written[engine] = seconds(lambda run=run: run(new_tokens))
                if measured >= 0:
                    prefill[engine].append(prompt_tokens / first)
                    decode[engine].append((new_tokens - 1) / (whole - first))
            if written["pyllama"] != written["transformers"]:
                raise SystemExit(f"{name}: pyllama and transformers wrote different tokens: {written}")
        for test, figures in {
            f"prefill {prompt_tokens}": prefill,
            f"decode {new_tokens - 1}": decode,
        }.items():
            median = {engine: statistics.median(values) for engine, values in figures.items()}
            results.add(
                shape=name,
                test=test,
                unit="tokens/s",
                **{engine: round(value, 2) for engine, value in median.items()},
                ratio=round(median["pyllama"] / median["transformers"], 3),
                rounds=rounds,
                threads=torch.get_num_threads(),
            )
    results.show("tokens/s, greedy, float32, batch 1; ratio: pyllama / transformers")


if __name__ == "__main__":
    typer.run(main)
