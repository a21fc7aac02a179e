"""Checkpoints written for tests: one file, shards with an index, or one file for each rank, in either format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"


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
