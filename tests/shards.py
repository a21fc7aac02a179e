"""Checkpoints written for tests: one file, shards with an index, or one file for each rank, in either format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyllama.architectures import read_config
from pyllama.config import ModelConfig
from pyllama.model import Model
from pyllama.save import unstack

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
CONFIGS = Path(__file__).parent / "configs"
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}


def save(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    else:
        torch.save(tensors, file)


def write(folder: Path, *files: dict[str, Tensor], whole: str = SAFETENSORS) -> None:
    """One file of the name `whole`, or shards with their index."""
    if len(files) == 1:
        save(files[0], folder / whole)
        return
    stem, _, suffix = whole.partition(".")
    weight_map = {}
    for n, file in enumerate(files):
        name = f"{stem}-{n}.{suffix}"
        save(file, folder / name)
        weight_map |= dict.fromkeys(file, name)
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_by_rank(folder: Path, *files: dict[str, Tensor], whole: str = SAFETENSORS) -> None:
    """One file for each rank, named as DeepSeek's safetensors and Meta's files of torch.save are."""
    for n, file in enumerate(files):
        save(
            file,
            folder / (f"model{n}-mp{len(files)}.safetensors" if whole == SAFETENSORS else f"consolidated.{n:02}.pth"),
        )


def write_headers(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of safetensors whose data take no room: the file system has them as a hole."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + end)


def write_headers_of(folder: Path, name: str, dtype: str = "BF16", **changes: Any) -> ModelConfig:
    """The checkpoint of a configuration in configs/, with changes to it; its data take no room."""
    values = json.loads((CONFIGS / name / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(values))
    config, table = read_config(values)
    with torch.device("meta"):
        model = Model(config)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter, value in model.named_parameters():
        found = unstack(table, config, parameter, value)
        tensors |= {tensor: (dtype, tuple(part.shape)) for tensor, part in found.items()}
    write_headers(folder / SAFETENSORS, tensors)
    return config
