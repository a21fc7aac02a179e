"""A random model of a real one's size: kernels beside eager bodies, in what they compute and how long they take.

    python -m benchmarks.model_check [--config tests/configs/Llama-3.2-1B-Instruct] [--tokens 64] [--json rows.jsonl]
    python -m benchmarks.model_check --config tests/configs/Qwen3-30B-A3B --first 0 --layers 4
    python -m benchmarks.model_check --config tests/configs/DeepSeek-R1 --first 2 --layers 2 --experts 64

`--first`, `--layers` and `--experts` cut a model down to what memory holds (the weights three times over), its shapes
being those of the real one.

Both write greedily after the same prompt. In bfloat16 a near tie ends their agreement sooner or later, so the verdict
is on logits of given tokens: the kernels' may be no further from the eager model's in float32 than the eager model's
in bfloat16, up to a factor; with experts those of the median token, as rounding decides between experts that are as
good. Exits with 1 if they are. Without a GPU it runs eager bodies against themselves.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import pyllama
from benchmarks.results import Results
from pyllama.architectures import read_config
from pyllama.batch import Batch
from pyllama.bench.engines import random_model as bench_model
from pyllama.cache import PAGE_SIZE, PagedCache, pages_for
from pyllama.config import LayerConfig, ModelConfig, MoEConfig
from pyllama.inspection.workspace import Use, cublas_workspace
from pyllama.model import Model
from pyllama.ops.registry import OPS, implementation

CONFIG = Path(__file__).parents[1] / "tests" / "configs" / "Llama-3.2-1B-Instruct"
PROMPT_TOKENS = 100  # more than a page of the cache
ERROR_FACTOR = 1.25


def cut_down(config: ModelConfig, first: int, layers: int | None, experts: int | None) -> ModelConfig:
    """`layers` layers from `first` on (None: all that follow), each with at most `experts` experts."""

    def cut(layer: LayerConfig) -> LayerConfig:
        if experts is None or not isinstance(layer.ffn, MoEConfig):
            return layer
        return replace(layer, ffn=replace(layer.ffn, num_experts=min(experts, layer.ffn.num_experts)))

    chosen = config.layers[first : None if layers is None else first + layers]
    return replace(config, layers=tuple(map(cut, chosen)))


def random_model(config: ModelConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Model:
    """`pyllama bench`'s, but for routers' correction biases, which are not 0."""
    model = bench_model(config, torch.device(device), dtype, seed)
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return model


@torch.inference_mode()
def logits_of_given(model: Model, prompt: list[int], tokens: list[int]) -> Tensor:
    """[len(tokens), V]: before each token, the prompt in one pass and the tokens one by one, as in generation."""
    pages = pages_for(len(prompt) + len(tokens))
    cache = PagedCache(model.config, pages, model.device, model.dtype)
    block_table = torch.tensor([cache.allocate(pages)], dtype=torch.int32, device=model.device)
    logits, done = [], 0
    for new in (prompt, *([token] for token in tokens[:-1])):
        done += len(new)
        batch = Batch.from_lengths([len(new)], [done], block_table, PAGE_SIZE)
        logits.append(model.run(torch.tensor(new, device=model.device), batch, cache))
    return torch.cat(logits)


def compare(
    model: Model,
    tokens: int,
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext,
    seed: int = 0,
) -> dict[str, Any]:
    """A row; "passed" is the verdict. The model is in half precision. kernels: inside, the kernels run, as they do by
    themselves on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()

    def written() -> tuple[list[int], float]:
        pyllama.generate(model, prompt, max_new_tokens=3, ignore_eos=True)  # warms up
        out = pyllama.generate(model, prompt, max_new_tokens=tokens, ignore_eos=True)
        return out.token_ids, 1e3 * out.generation_seconds / (tokens - 1)

    with pyllama.eager():
        eager_tokens, eager_ms = written()
        eager = logits_of_given(model, prompt, eager_tokens).float()
        exact = logits_of_given(copy.deepcopy(model).float(), prompt, eager_tokens)
    with kernels():
        found_tokens, found_ms = written()
        found = logits_of_given(model, prompt, eager_tokens).float()
        on_kernels = sum(implementation(op, model.device) != "eager" for op in OPS)
    spread = exact.std()
    routed = any(isinstance(layer.ffn, MoEConfig) for layer in model.config.layers)
    squares = [(x - exact).square().mean(dim=-1) for x in (found, eager)]
    errors = [((x.median() if routed else x.mean()).sqrt() / spread).item() for x in squares]
    agree = [ours == theirs for ours, theirs in zip(found_tokens, eager_tokens, strict=True)]
    return {
        "passed": errors[0] <= ERROR_FACTOR * errors[1],
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "ops_with_kernel": on_kernels,
        "tokens": tokens,
        "leading_tokens_equal": [*agree, False].index(False),
        "worst_difference": ((found - eager).abs().max() / spread).item(),  # in spreads, as are the errors
        "error": errors[0],
        "eager_error": errors[1],
        "ms_per_token": found_ms,
        "eager_ms_per_token": eager_ms,
    }


FIT_CELL = 8, 2048  # sequences, and tokens of each in the end
FIT_SHARE = 0.03


def compare_memory(model: Model) -> dict[str, Any]:
    """A row: bytes computed by `pyllama fit` and taken. The model is on a GPU, and nothing else of this process."""
    batch, context = FIT_CELL
    device, dtype = model.device, model.dtype
    use = Use(model.config, dtype, device.type, cublas=cublas_workspace(device))
    computed = use.loaded(), use.generating(batch, context)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    loaded, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
    pyllama.generate(model, [[5] * (context - 8)] * batch, max_new_tokens=8, temperature=1.0, ignore_eos=True)
    torch.cuda.synchronize(device)
    reserved = torch.cuda.max_memory_reserved(device)
    grown = loaded + free - torch.cuda.mem_get_info(device)[0]
    return {
        "fit_passed": abs(computed[1] - reserved) <= FIT_SHARE * reserved,
        "fit_loaded_bytes": computed[0],
        "loaded_bytes": loaded,
        "fit_bytes": computed[1],
        "reserved_bytes": reserved,
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "grown_bytes": grown,  # with kernels, graphs and what else CUDA itself keeps
        "outside_bytes": torch.cuda.get_device_properties(device).total_memory - free - loaded,  # the context, others'
    }


def main(
    config: Annotated[Path, typer.Option(help="folder with a config.json")] = CONFIG,
    tokens: Annotated[int, typer.Option(min=2)] = 64,
    first: Annotated[int, typer.Option(min=0, help="the first layer that is kept")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="how many are kept")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="of a layer, at most")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="append the row to this file")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    read, _ = read_config(json.loads((config / "config.json").read_text()))
    results = Results(rows)
    model = random_model(cut_down(read, first, layers, experts), device, torch.bfloat16)
    memory = compare_memory(model) if device == "cuda" else {}
    row = memory | compare(model, tokens)
    results.add(model=config.name, **{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    results.show("bfloat16, greedy, batch 1; differences in standard deviations of the logits")
    raise SystemExit(not (row["passed"] and row.get("fit_passed", True)))


if __name__ == "__main__":
    typer.run(main)
