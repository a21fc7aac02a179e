"""Time and memory of loading a model, beside transformers on the same files, on the CPU and on a GPU.

    python -m benchmarks.load [--model experts --model dense] [--dtype bfloat16 --dtype float32] [--rounds 7]
                              [--gigabytes 2] [--device cuda]

The files are safetensors in bfloat16, several shards; a mixture of experts has a tensor for each. Times are of all in
turns within one process, from a warm page cache; medians.

On the CPU memory is the growth of anonymous memory (RssAnon, the pages that are no file's) in a process of its own,
sampled from outside; `spare` is how much less it is than the model and one stacked tensor.

On a GPU `reader` is what pyllama's reader alone needs for the files' bytes, `safetensors` is its `load_file` of all,
and `share` is the reader's rate over that of copies from pinned memory (256 MiB, the best of 10), in the same run.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import pyllama
from benchmarks.results import Results
from pyllama.transfer import device_reader

EXPERTS = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
MODELS = {"experts": EXPERTS, "dense": DENSE}
SHARD_BYTES = 500_000_000
LOADERS = {
    "pyllama": "import pyllama; load = lambda: pyllama.load(folder, device='cpu', dtype=dtype)",
    "transformers": "from transformers import AutoModelForCausalLM; "
    "load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)",
}


def shapes(config: dict[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, by its name in the file."""
    D, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    E = config.get("num_local_experts", 0)
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        found |= {f"{layer}.self_attn.{part}_proj.weight": (D if part in "qo" else D // 4, D) for part in "qkvo"}
        if E:
            found[f"{layer}.block_sparse_moe.gate.weight"] = (E, D)
        else:
            mlp = f"{layer}.mlp"
            found |= {f"{mlp}.{part}_proj.weight": (F, D) for part in ("gate", "up")}
            found[f"{mlp}.down_proj.weight"] = (D, F)
        for e in range(E):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            found |= {f"{expert}.w1.weight": (F, D), f"{expert}.w2.weight": (D, F), f"{expert}.w3.weight": (F, D)}
    return found


def numbers(config: dict[str, Any], layers: int) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(config, layers).values())


def layers_of(config: dict[str, Any], gigabytes: float) -> int:
    """How many layers make a model of about this size in bfloat16."""
    none, one = (numbers(config, layers) for layers in (0, 1))
    return max(1, round((gigabytes * 1e9 / 2 - none) / (one - none)))


def write(folder: Path, config: dict[str, Any], layers: int) -> None:
    """The checkpoint, random, in shards with their index."""
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    wanted = shapes(config, layers)
    noise = torch.randn(2**24 + max(torch.Size(shape).numel() for shape in wanted.values())).bfloat16() * 0.02
    for n, (name, shape) in enumerate(wanted.items(), 1):
        start = int(torch.randint(2**24, ()))
        shard[name] = noise[start : start + torch.Size(shape).numel()].view(shape).clone()
        if n == len(wanted) or sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def anonymous(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


def peak_memory(engine: str, folder: Path, dtype: str) -> int:
    """By how many bytes anonymous memory grows at most while the checkpoint is loaded."""
    script = (
        f"folder, dtype = {str(folder)!r}, {dtype!r}\n{LOADERS[engine]}\nprint('ready', flush=True)\ninput()\nload()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = peak = anonymous(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{engine} failed")
    return peak - before


def check_equal(ours: pyllama.Model, theirs: PreTrainedModel) -> None:
    """Both hold the same weights, which the largest of them show."""
    pairs = [(ours.embedding.weight, theirs.model.embed_tokens.weight)]
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        pairs.append((mine.attention.out.weight, other.self_attn.o_proj.weight))
        if hasattr(other.mlp, "experts"):
            experts = other.mlp.experts
            pairs += [(mine.ffn.gate_up, experts.gate_up_proj), (mine.ffn.down, experts.down_proj)]
        else:
            pairs.append((mine.ffn.down.weight, other.mlp.down_proj.weight))
    if not all(torch.equal(mine, other) for mine, other in pairs):
        raise SystemExit("pyllama and transformers loaded different weights")


def in_turns(engines: dict[str, Callable[[], object]], rounds: int, what: str, device: str) -> dict[str, float]:
    """The median of each one's seconds."""
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in track(range(rounds), description=what):
        for engine, load in engines.items():
            start = time.perf_counter()
            result = load()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[engine].append(time.perf_counter() - start)
            del result
    return {engine: statistics.median(values) for engine, values in seconds.items()}


def read_files(folder: Path) -> torch.Tensor:
    """All bytes of the files on the GPU, by pyllama's reader."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in sorted(folder.glob("*.safetensors"))]
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        place = torch.empty(sum(sizes), dtype=torch.uint8, device="cuda")
        starts = [place.data_ptr() + sum(sizes[:n]) for n in range(len(files))]
        pieces = [(n, 0, start, 1, size, size) for n, (start, size) in enumerate(zip(starts, sizes, strict=True))]
        device_reader(place.device).read([(file.fileno(), file.name) for file in files], pieces, lambda _: None)
    return place


def pinned_rate() -> float:
    """Bytes per second of a copy from pinned memory to the GPU."""
    host = torch.ones(2**28, dtype=torch.uint8).pin_memory()
    place = torch.empty_like(host, device="cuda")
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        place.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return host.nbytes / min(seconds)


def main(
    model: Annotated[list[str], typer.Option(help=f"{', '.join(MODELS)}; may be repeated")] = list(MODELS),  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="may be repeated")] = ["bfloat16", "float32"],  # noqa: B006
    rounds: int = 7,
    gigabytes: Annotated[float, typer.Option(help="of the files")] = 2.1,
    device: str = "cpu",
    output: Path = Path(__file__).parent / "results",
) -> None:
    logging.disable_progress_bar()
    results = Results(output / "load.jsonl")
    for name, wanted in itertools.product(model, dtype):
        config, layers = MODELS[name], layers_of(MODELS[name], gigabytes)
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            write(folder, config, layers)
            results.add(model=name, dtype=wanted, **measured(folder, config, layers, wanted, rounds, device))
    results.show(f"loading, warm, to {device}; ratio: transformers / pyllama")


def measured(
    folder: Path, config: dict[str, Any], layers: int, dtype: str, rounds: int, device: str
) -> dict[str, object]:
    """A row about the folder's checkpoint."""
    count, width = numbers(config, layers), getattr(torch, dtype).itemsize
    engines: dict[str, Callable[[], Any]] = {
        "pyllama": lambda: pyllama.load(folder, device=device, dtype=dtype),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device),
    }
    check_equal(*(load() for load in engines.values()))  # which warms up, too
    if device == "cuda":
        files = sorted(folder.glob("*.safetensors"))
        engines["safetensors"] = lambda: [load_file(file, device="cuda") for file in files]
        engines["reader"] = lambda: read_files(folder)
    median = in_turns(engines, rounds, dtype, device)
    row: dict[str, object] = {"model_gb": round(count * width / 1e9, 3), "tensors": len(shapes(config, layers))}
    row |= {f"{engine}_s": round(value, 3) for engine, value in median.items()}
    row["ratio"] = round(median["transformers"] / median["pyllama"], 3)
    if device == "cuda":
        size, pinned = sum(file.stat().st_size for file in files), pinned_rate()
        rate = size / median["reader"]
        row |= {"reader_gb_per_s": round(rate / 1e9, 1), "pinned_gb_per_s": round(pinned / 1e9, 1)}
        row["share"] = round(rate / pinned, 3)
    else:
        D, F, E = (config.get(key, 1) for key in ("hidden_size", "intermediate_size", "num_local_experts"))
        memory = {engine: peak_memory(engine, folder, dtype) for engine in engines}
        row |= {f"{engine}_gb": round(value / 1e9, 3) for engine, value in memory.items()}
        row["spare_mb"] = round(((count + E * 2 * F * D) * width - memory["pyllama"]) / 1e6, 1)
    return row | {"rounds": rounds, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    typer.run(main)
