"""`pyllama fit` against loaded models, real generations, measured memory, and figures worked out by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load_memory import sparse_checkpoint
from tiny import CONFIG, byte_level_tokenizer, write_checkpoint
from typer.testing import CliRunner

import pyllama
from pyllama.architectures import read_config
from pyllama.bench.engines import random_model
from pyllama.bench.shapes import SHAPES
from pyllama.cache import bytes_per_page, pages_for
from pyllama.cli import app
from pyllama.inspection.allocator import MIB
from pyllama.inspection.fit import Fit, _largest, fit
from pyllama.inspection.fit_report import lines
from pyllama.inspection.workspace import Use
from pyllama.model import Model
from pyllama.sampling import SamplingParams
from pyllama.step import CachedContext, Decoding

ROOT = Path(__file__).parents[1]
SAMPLED = SamplingParams(temperature=1.0, seed=0)


def on_cpu(source: Path | str, dtype: str | None = None, **options: Any) -> Fit:
    return fit(source, device="cpu", dtype=dtype, **{"memory": "64GB", "batches": [1]} | options)


def test_llama_8b_by_hand() -> None:
    found = fit("llama-3.1-8b", "80GB", contexts=[2048, 131072])
    D, F, V, layers, kv = 4096, 14336, 128256, 32, 8 * 128
    count = 2 * V * D + D + layers * (2 * D * D + 2 * kv * D + 3 * D * F + 2 * D)
    assert (found.device, found.dtype, found.parameters) == ("cuda", "bfloat16", count)
    assert found.weight_bytes == 2 * count == 16_060_522_496
    assert found.cache_bytes_per_token == 131072
    assert found.reserve == 2**30
    assert abs(found.left - (80e9 - 2**30 - 2 * count)) < 20 * MIB
    assert (found.fits, found.largest_context) == (True, 131072)
    for cell in found.cells:
        assert cell.cache_bytes == cell.batch * cell.context * 131072
        assert cell.bytes == found.weight_bytes + cell.cache_bytes + (cell.workspace_bytes or 0) or not cell.fits
        assert cell.fits == (cell.batch <= found.largest_batches[cell.context])
    assert found.largest_batches[131072] == 3  # 17.2 GB each
    # And what is not left does not fit: the next batch.
    assert not fit("llama-3.1-8b", "80GB", contexts=[131072], batches=[4]).cells[0].fits


def test_the_workspace_of_a_pass_by_hand() -> None:
    """The most is held in the product of gate and up: residual, its norm or the result, gate and up, in 2 bytes."""
    config = read_config(SHAPES["llama-3.1-8b"])[0]
    D, F, V, T = 4096, 14336, 128256, 2048
    use = Use(config, torch.bfloat16, "cpu")
    found = use.generating(1, T + 1) - sum(use.weights) - pages_for(T) * bytes_per_page(config, torch.bfloat16)
    table = 4 * 2048 * 128
    exact = 2 * T * (D + 3 * F) + table
    assert exact < found < exact + 64 * T  # and integers for each token
    # Of many sequences of few tokens logits are the most: the pass's, those of complete prompts, these of all passes.
    batch, prompt = 1024, 2
    found = use.generating(batch, prompt + 1) - sum(use.weights) - batch * bytes_per_page(config, torch.bfloat16)
    exact = 2 * 3 * batch * V
    assert exact < found < 1.001 * exact


def test_correction_biases_and_the_default_type() -> None:
    found, config = fit("deepseek-r1", "2000GB", batches=[1], contexts=[64]), read_config(SHAPES["deepseek-r1"])[0]
    biases = 256 * sum(type(layer.ffn).__name__ == "MoEConfig" for layer in config.layers)
    assert biases == 256 * 58
    assert found.weight_bytes == 2 * found.parameters + 2 * biases
    assert found.cache_bytes_per_token == 61 * 576 * 2
    assert fit("deepseek-r1", "3000GB", device="cpu", batches=[1], contexts=[64]).dtype == "float32"
    assert fit("deepseek-r1", "2000GB", device="cpu", batches=[1], contexts=[64]).dtype == "bfloat16"


@pytest.mark.parametrize(("prompt", "new", "batch"), [(1, 1, 1), (63, 2, 3), (64, 1, 2), (64, 2, 2), (200, 57, 5)])
def test_the_cache_is_that_of_a_generation(prompt: int, new: int, batch: int, model: Model, folder: Path) -> None:
    decoding = Decoding(model, [[5] * prompt] * batch, [new] * batch, SAMPLED)
    assert isinstance(decoding._context, CachedContext)
    made = sum(layer.nbytes for layer in decoding._context._cache.layers)
    (cell,) = on_cpu(folder, "float32", contexts=[prompt + new], batches=[batch]).cells
    assert cell.cache_bytes == made


WORKSPACE_CASES = {
    "dense": CONFIG | {"max_position_embeddings": 8192},
    "experts": CONFIG
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "max_position_embeddings": 8192, "sliding_window": None},
    "latent": SHAPES["deepseek-v2-lite"]
    | {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 64, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300, "n_routed_experts": 8}
    | {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
}


def peak_between_ops(events: Sequence[Any]) -> int:
    """Bytes that the allocator has given out at most, but for what an op gives back before its end."""
    moments = [(event.start_ns(), 1, event.nbytes()) for event in events if event.name() == "[memory]"]
    for event in events:
        if event.name().startswith(("pyllama::", "aten::")):
            moments += [(event.start_ns(), 0, 1), (event.end_ns(), 2, -1)]
    now = inside = peak = 0
    for _, kind, change in sorted(moments):
        now, inside = (now + change, inside) if kind == 1 else (now, inside + change)
        peak = max(peak, now if inside == 0 else 0)
    return peak


@pytest.mark.parametrize(("batch", "prompt"), [(1, 700), (3, 900), (2, 3000), (40, 20)])
@pytest.mark.parametrize("name", WORKSPACE_CASES)
def test_the_workspace_is_that_of_a_generation(name: str, batch: int, prompt: int) -> None:
    """torch's profiler watches the allocator in a real one, of all layers and all passes."""
    config = read_config(WORKSPACE_CASES[name])[0]
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    pyllama.generate(model, [5] * prompt, max_new_tokens=2, ignore_eos=True)  # after it tables of RoPE are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        decoding = Decoding(model, [[5] * prompt] * batch, [2] * batch, SAMPLED)
        for _ in range(2):
            decoding.step()
    tables = sum(table.nbytes for _, table in model._tables.values())
    measured = tables + peak_between_ops(profiler.profiler.kineto_results.events())
    use = Use(config, torch.bfloat16, "cpu")
    assert 0.97 * measured < use.generating(batch, prompt + 1) - sum(use.weights) < 1.03 * measured


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generation_on_a_gpu_takes_what_was_said(tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path, 10**9, "BF16")
    found = fit(tmp_path, contexts=[2048], batches=[4])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = pyllama.load(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    pyllama.generate(model, [[5] * 2000] * 4, max_new_tokens=48, temperature=1.0, ignore_eos=True)
    measured = torch.cuda.max_memory_reserved() - before
    assert 0.97 * found.cells[0].bytes < measured < 1.03 * found.cells[0].bytes


GROWTH = """
import re, sys
from pathlib import Path
import torch, pyllama
from pyllama.sampling import SamplingParams
from pyllama.step import Decoding

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

kept = pyllama.load("demo", "cpu")  # so that nothing is left of a first time, and nothing of it is free again
before = resident()
model = pyllama.load(sys.argv[1], "cpu", sys.argv[2])
loaded = resident()
prompts = [[5] * int(sys.argv[3])] * int(sys.argv[4])
decoding = Decoding(model, prompts, [1] * len(prompts), SamplingParams())
with torch.inference_mode():
    for layer in decoding._context._cache.layers:
        layer.fill_(1)  # as memory is taken when it is written
print(loaded - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("stored", "wanted"), [("BF16", "float32"), ("F32", "bfloat16"), ("F32", "float32")])
def test_memory_measured(stored: str, wanted: str, tmp_path: Path) -> None:
    """Of a process, by the system: weights that are converted, and in their own type all but those that are mapped."""
    sparse_checkpoint(tmp_path, 3 * 10**8 if stored == "F32" else 2 * 10**8, stored)
    found = on_cpu(tmp_path, wanted, contexts=[1025], batches=[6])
    command = [sys.executable, "-c", GROWTH, str(tmp_path), wanted, "1024", "6"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, generating = map(int, run.stdout.split())
    copied = found.weight_bytes - found.mapped_bytes
    assert (found.mapped_bytes > 0) == (stored == "F32" and wanted == "float32")
    assert 0.97 * copied < loaded < 1.03 * copied
    needed = copied + found.cells[0].cache_bytes
    assert 0.97 * needed < generating < 1.03 * needed


def test_a_checkpoint_larger_than_memory(tmp_path: Path) -> None:
    numbers, _ = sparse_checkpoint(tmp_path, 700 * 10**9, "BF16", D=8192)
    found = fit(tmp_path, "640GB", batches=[1, 2])
    assert found.weight_bytes == 2 * numbers
    assert (found.fits, found.left < -50e9, found.largest_context) == (False, True, 0)
    assert set(found.largest_batches.values()) == {0}
    assert fit(tmp_path, "800GiB", batches=[1]).fits


def test_what_is_converted_for_a_device_takes_memory(tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path, 2 * 10**8, "BF16")
    own, wider = fit(tmp_path, "1TB"), fit(tmp_path, "1TB", dtype="float32")
    room = 10**12 - 2**30
    assert room - own.left == pytest.approx(own.weight_bytes, abs=24 * MIB)
    assert room - wider.left == pytest.approx(wider.weight_bytes + own.weight_bytes, abs=24 * MIB)  # all at once
    assert not wider.mapped_bytes


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"] | {"torch_dtype": "float16"}))
    found, shape = fit(tmp_path, "24GB"), fit("qwen3-0.6b", "24GB")
    assert (found.dtype, shape.dtype) == ("float16", "bfloat16")
    assert (found.cells, found.largest_batches) == (shape.cells, shape.largest_batches)
    write_checkpoint(tmp_path / "own", byte_level_tokenizer())
    config = json.loads((tmp_path / "own" / "config.json").read_text()) | {"dtype": "float16"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    assert fit(tmp_path / "own", "24GB").dtype == "float32"  # as its files are
    assert [cell.context for cell in fit("demo", "1GiB", batches=[1]).cells] == [512]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": "80 bananas"},
            "memory must be a number of bytes, or one as in '5GB' or '500MiB', got '80 bananas'",
        ),
        ({"memory": "9" * 400}, "memory must be a number of bytes"),
        ({"memory": 0}, "memory must be a number of bytes"),
        ({"memory": "-1GB"}, "memory must be a number of bytes"),
        ({"reserve": "much"}, "reserve must be a number of bytes"),
        ({"device": "tpu"}, "device must be a CPU or a CUDA device"),
        ({"device": "meta"}, "device must be a CPU or a CUDA device"),
        ({"dtype": "int4"}, "dtype must be one of float32"),
        ({"contexts": [2048]}, "a context may have 2 to 512 tokens, prompt and new ones together, got 2048"),
        ({"batches": [0]}, "a batch may have 1 to 1024 sequences, got 0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("demo", **{"memory": "1GB"} | options)


HOSTILE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
from pyllama.inspection.fit import fit
found = fit(sys.argv[1], "80GB", sys.argv[2], batches=[1, 8])
print(found.max_positions, found.largest_context)
"""
TINY_LAYER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "values",
    [
        SHAPES["qwen3-0.6b"]
        | TINY_LAYER
        | {"head_dim": 2, "num_hidden_layers": 2, "max_position_embeddings": 2**31 - 1},
        SHAPES["deepseek-v2-lite"] | {"rope_scaling": None, "max_position_embeddings": 2**31 - 1},
        SHAPES["qwen3-0.6b"] | TINY_LAYER | {"head_dim": 2, "vocab_size": 9, "num_hidden_layers": 4096},
    ],
    ids=["positions", "latent positions", "layers"],
)
def test_whatever_a_configuration_says_takes_seconds(values: dict[str, Any], device: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", HOSTILE, str(tmp_path), device]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    longest, largest = map(int, run.stdout.split())
    assert longest == values["max_position_embeddings"]
    assert longest >= largest > 30_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 4097}, "describes 4,097 layers, and 4,096 are the most here"),
        ({"max_position_embeddings": 1}, "holds 1 token, prompt and new ones together: nothing can be generated"),
    ],
)
def test_configurations_of_no_use(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"] | values))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, "80GB")


def test_the_largest_is_found_in_few_steps() -> None:
    """Also where sizes leap, as tables do at powers of two."""
    asked: list[int] = []

    def size(number: int) -> int:
        asked.append(number)
        return number + 10**12 * (number > 12345)

    assert _largest(size, 10**6, 2**31) == 12345
    assert len(asked) < 70
    assert _largest(size, 12344, 2**31) == 12344


def test_a_file_is_a_source() -> None:
    folder = Path(pyllama.__file__).parent / "demo"
    found = fit(folder / "model.safetensors", "1GB", batches=[1])
    assert replace(found, source="demo") == fit("demo", "1GB", batches=[1])


def test_kernels_take_no_float64_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(Path(pyllama.__file__).parent / "demo" / "model.safetensors")
    save_file({name: weight.double() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    shutil.copy(Path(pyllama.__file__).parent / "demo" / "config.json", tmp_path)
    monkeypatch.setattr("pyllama.loader.implementation", lambda *_: "eager")
    assert fit(tmp_path, "1GB", batches=[1]).dtype == "float64"
    monkeypatch.setattr("pyllama.loader.implementation", lambda *_: "cuda")
    with pytest.raises(ValueError, match="the CUDA kernels do not take float64"):
        fit(tmp_path, "1GB", batches=[1])


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    sparse_checkpoint(tmp_path, 2 * 10**8, "BF16")
    for memory, words in (
        ("300MB", r"^does not fit +the weights alone need \d+.\d+ MB more than there is$"),
        ("400MB", r"^does not fit +loading the weights takes \d+ MB more than there is$"),
        ("1GB", r"^left +\d+ MB beside the weights and what converting them takes$"),
    ):
        text = "\n".join(lines(fit(tmp_path, memory, dtype="float32", batches=[1], reserve=0)))
        assert re.search(words, text, re.MULTILINE), text
    assert re.search(r"beside the weights$", "\n".join(lines(fit(tmp_path, "5GB"))), re.MULTILINE)


def test_sizes() -> None:
    memory = [fit("demo", size, batches=[1]).memory for size in ("2gb", "2GiB", "2000 MB", "1.5KiB", "3TiB", 7)]
    assert memory == [2 * 10**9, 2**31, 2 * 10**9, 1536, 3 * 2**40, 7]
    assert (
        fit("demo", "1GB", reserve=0, batches=[1]).left == fit("demo", "1GB", reserve="1MB", batches=[1]).left + 10**6
    )


def test_the_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fit", "llama-3.1-8b", "--memory", "24GB", "--batch", "1,8", "--context", "4096"])
    assert result.exit_code == 0, result.output
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in result.stdout.split("\n\n")[0].splitlines())
    assert facts["weights"] == "16.1 GB, 8,030,261,248 parameters"
    assert facts["cache per token"] == "131 kB"
    assert facts["memory"] == "24 GB, of which 1.07 GB are left alone"
    largest = int(facts["largest context"].split()[0].replace(",", ""))
    assert 0.9 < largest * 131072 / (24e9 - 2**30 - 16.06e9) < 1
    header, row = (re.split(r"\s{2,}", line) for line in result.stdout.split("\n\n")[1].splitlines())
    assert header == ["context", "batch 1", "batch 8", "largest batch"]
    assert row[0] == "4,096"
    assert 16.8 < float(row[1].removesuffix(" GB")) < 17.2
    assert 20 < float(row[2].removesuffix(" GB")) < 21.5
    result = CliRunner().invoke(app, ["fit", "llama-3.1-8b", "--memory", "16GB", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fits"] is False
    result = CliRunner().invoke(app, ["fit", "llama-3.1-8b", "--memory", "16GB"])
    assert result.exit_code == 1
    assert re.search(
        r"^does not fit +the weights alone need 1.\d\d GB more than there is$", result.stdout, re.MULTILINE
    )
    assert re.search(r"^1,024 +✗ 16.2 GB", result.stdout, re.MULTILINE)
    for source, message in (
        (tmp_path, "has no config.json"),
        ("llama-3.1-9b/", "there is no folder"),
        (tmp_path / "nothing", "there is no folder"),
    ):
        result = CliRunner().invoke(app, ["fit", str(source), "--memory", "16GB"])
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr
