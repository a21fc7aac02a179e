"""Time and memory of loading a mixture of experts of 2 GB on the CPU, beside transformers on the same files.

    python -m benchmarks.load [--dtype bfloat16 --dtype float32] [--rounds 7] [--layers 11]

The files are safetensors in bfloat16, several shards, a tensor for each expert. Times are of both in turns within one
process, from a warm page cache; medians. Memory is the growth of anonymous memory (RssAnon, the pages that are no
file's) in a process of its own, sampled from outside; `spare` is how much less it is than the model and one stacked
tensor.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from safetensors.torch import save_file
from transformers import MixtralForCausalLM
from transformers.utils import logging

import pyllama
from benchmarks.results import Results

CONFIG = {
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
SHARD_BYTES = 500_000_000
LOADERS = {
    "pyllama": "import pyllama; load = lambda: pyllama.load(folder, device='cpu', dtype=dtype)",
    "transformers": "from transformers import MixtralForCausalLM; "
    "load = lambda: MixtralForCausalLM.from_pretrained(folder, dtype=dtype)",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, by its name in the file."""
    D, F, E, V = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_local_experts", "vocab_size"))
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        found |= {f"{layer}.self_attn.{part}_proj.weight": (D if part in "qo" else D // 4, D) for part in "qkvo"}
        found[f"{layer}.block_sparse_moe.gate.weight"] = (E, D)
        for e in range(E):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            found |= {f"{expert}.w1.weight": (F, D), f"{expert}.w2.weight": (D, F), f"{expert}.w3.weight": (F, D)}
    return found


def write(folder: Path, layers: int) -> None:
    """The checkpoint, random, in shards with their index."""
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    wanted = shapes(layers)
    for n, (name, shape) in enumerate(wanted.items(), 1):
        shard[name] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
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


def check_equal(ours: pyllama.Model, theirs: MixtralForCausalLM) -> None:
    """Both hold the same weights, which the largest of them show."""
    pairs = [(ours.embedding.weight, theirs.model.embed_tokens.weight)]
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        pairs += [(mine.ffn.gate_up, other.mlp.experts.gate_up_proj), (mine.ffn.down, other.mlp.experts.down_proj)]
    if not all(torch.equal(mine, other) for mine, other in pairs):
        raise SystemExit("pyllama and transformers loaded different weights")


def main(
    dtype: Annotated[list[str], typer.Option(help="may be repeated")] = ["bfloat16", "float32"],  # noqa: B006
    rounds: int = 7,
    layers: int = 11,
    output: Path = Path(__file__).parent / "results",
) -> None:
    logging.disable_progress_bar()
    results = Results(output / "load.jsonl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, layers)
        numbers = sum(torch.Size(shape).numel() for shape in shapes(layers).values())
        stacked = CONFIG["num_local_experts"] * 2 * CONFIG["intermediate_size"] * CONFIG["hidden_size"]
        for wanted in dtype:
            engines: dict[str, Callable[[], Any]] = {
                "pyllama": lambda wanted=wanted: pyllama.load(folder, device="cpu", dtype=wanted),
                "transformers": lambda wanted=wanted: MixtralForCausalLM.from_pretrained(folder, dtype=wanted),
            }
            check_equal(*(load() for load in engines.values()))  # which warms up, too
            seconds: dict[str, list[float]] = {engine: [] for engine in engines}
            for _ in track(range(rounds), description=wanted):
                for engine, load in engines.items():
                    start = time.perf_counter()
                    model = load()
                    seconds[engine].append(time.perf_counter() - start)
                    del model
            median = {engine: statistics.median(values) for engine, values in seconds.items()}
            width = getattr(torch, wanted).itemsize
            memory = {engine: peak_memory(engine, folder, wanted) for engine in engines}
            results.add(
                dtype=wanted,
                model_gb=round(numbers * width / 1e9, 3),
                tensors=len(shapes(layers)),
                **{f"{engine}_s": round(value, 3) for engine, value in median.items()},
                ratio=round(median["transformers"] / median["pyllama"], 3),
                **{f"{engine}_gb": round(value / 1e9, 3) for engine, value in memory.items()},
                spare_mb=round(((numbers + stacked) * width - memory["pyllama"]) / 1e6, 1),
                rounds=rounds,
                threads=torch.get_num_threads(),
            )
    results.show("loading on the CPU, warm; ratio: transformers / pyllama")


if __name__ == "__main__":
    typer.run(main)
