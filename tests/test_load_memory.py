"""What loading takes of memory: the model and no more; and what it does where that is not there."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyllama
from pyllama.cache import free_memory
from pyllama.loader import _fitting_dtype

WIDTHS = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def write_zeros(folder: Path, shapes: dict[str, list[int]], dtype: str) -> int:
    """A file of zeros, and so of no blocks on the disk; returns how many numbers it has."""
    header, end = {}, 0
    for name, shape in shapes.items():
        stored = "F32" if "scale_inv" in name or (dtype == "F8_E4M3" and len(shape) == 1) else dtype
        start, end = end, end + torch.Size(shape).numel() * WIDTHS[stored]
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if "scale_inv" not in name)


def sparse_checkpoint(folder: Path, size: int, dtype: str = "F32", D: int = 1024) -> tuple[int, int]:
    """A Llama of `size` bytes; how many numbers it and a stack have."""
    F, width = 4 * D, WIDTHS[dtype]
    layer = {"input_layernorm": [D], "post_attention_layernorm": [D]}
    layer |= {f"self_attn.{part}_proj": [D, D] for part in "qkvo"}
    layer |= {"mlp.gate_proj": [F, D], "mlp.up_proj": [F, D], "mlp.down_proj": [D, F]}
    per_layer = sum(torch.Size(shape).numel() for shape in layer.values())
    layers = size // (per_layer * width)
    shapes = {"model.embed_tokens.weight": [64, D], "model.norm.weight": [D], "lm_head.weight": [64, D]}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    numbers = write_zeros(folder, shapes, dtype)
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": D, "intermediate_size": F}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return numbers, 2 * F * D


@pytest.mark.parametrize(("times", "what"), [(0.5, "parameters in torch.float64 need"), (4, "need|cannot be mapped")])
def test_weights_that_do_not_fit_the_memory_are_refused(times: float, what: str, tmp_path: Path) -> None:
    """Files of `times` the free memory, to be four times as large when loaded: refused before anything is read."""
    size = int(times * free_memory(torch.device("cpu")))
    sparse_checkpoint(tmp_path, size, "BF16", D=8192)
    with pytest.raises(MemoryError, match=what):
        pyllama.load(tmp_path, device="cpu", dtype="float64")


def test_the_checkpoints_type_is_taken_when_only_that_fits() -> None:
    """On a CPU, and said; what was asked for is never replaced."""
    cpu = torch.device("cpu")
    parameters = int(0.35 * free_memory(cpu))
    with pytest.warns(UserWarning, match=r"weights in torch.float32 need .*: loading them as torch.bfloat16, slower"):
        assert _fitting_dtype(None, torch.bfloat16, parameters, cpu) == torch.bfloat16
    with pytest.raises(MemoryError):
        _fitting_dtype(torch.float32, torch.bfloat16, parameters, cpu)
    with pytest.raises(MemoryError):
        _fitting_dtype(None, torch.float32, parameters, cpu)
    assert _fitting_dtype(None, torch.bfloat16, 1000, cpu) == torch.float32


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0")
    return int(line.split()[1]) * 1024


def growth(folder: Path, wanted: str) -> int:
    """By how much loading a checkpoint makes a process grow at most, as another process sees it."""
    script = f"""
import pyllama, sys
print("ready", flush=True)
sys.stdin.readline()
model = pyllama.load({str(folder)!r}, device="cpu", dtype={wanted!r})
"""
    arguments = [sys.executable, "-c", script]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    return peak - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "stored", "wanted"),
    [(10**9, "F32", "float32"), (5 * 10**8, "BF16", "float32"), (10**9, "F32", "bfloat16")],
)
def test_weights_are_held_once(size: int, stored: str, wanted: str, tmp_path: Path) -> None:
    """Loading 1 GB takes the memory of the model and at most one stacked tensor; of a file's type, what is stacked."""
    numbers, stack = sparse_checkpoint(tmp_path, size, stored)
    grown = growth(tmp_path, wanted)
    width = getattr(torch, wanted).itemsize
    assert numbers * width > 400 * 10**6
    if (stored, wanted) == ("F32", "float32"):
        numbers = numbers * 11 // 16  # of q, k, v, o [D, D] and gate, up, down [4 D, D], o and down are mapped
    assert 0.95 * numbers * width < grown < (numbers + stack) * width + 16 * 2**20


def sparse_experts(folder: Path, dtype: str) -> tuple[int, int]:
    """A Mixtral of two layers with 16 experts, each a tensor of the file; how many numbers it and a stack have."""
    D, F, E = 512, 1024, 16
    shapes = {"model.embed_tokens.weight": [64, D], "model.norm.weight": [D], "lm_head.weight": [64, D]}
    for i in range(2):
        layer = {"input_layernorm": [D], "post_attention_layernorm": [D], "block_sparse_moe.gate": [E, D]}
        layer |= {f"self_attn.{part}_proj": [D, D] for part in "qkvo"}
        for e in range(E):
            sizes = {"w1": [F, D], "w2": [D, F], "w3": [F, D]}
            layer |= {f"block_sparse_moe.experts.{e}.{part}": size for part, size in sizes.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    config = {"architectures": ["MixtralForCausalLM"], "vocab_size": 64, "hidden_size": D, "intermediate_size": F}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_local_experts": E, "num_key_value_heads": 8}
    if dtype == "F8_E4M3":
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
        scales = {f"{name}_scale_inv": [-(-n // 128) for n in shape] for name, shape in matrices.items()}
        shapes |= scales
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return write_zeros(folder, shapes, dtype), E * 2 * F * D


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("stored", "wanted"), [("BF16", "bfloat16"), ("BF16", "float32"), ("F8_E4M3", "bfloat16")])
def test_experts_are_held_once(stored: str, wanted: str, tmp_path: Path) -> None:
    """Stacked as they are read, and those of 8 bits multiplied out one at a time."""
    numbers, stack = sparse_experts(tmp_path, stored)
    width = getattr(torch, wanted).itemsize
    assert 0.95 * numbers * width < growth(tmp_path, wanted) < (numbers + stack) * width
