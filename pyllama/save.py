"""Writing a checkpoint: parameters back under their tensors' names, in safetensors files that are filled as they come.

A file's header needs shapes only, which the same functions give for tensors on the meta device. So the files are
planned whole, and then written one tensor after the other: no more than a piece of the model is in memory.
(safetensors' own `save_file` takes a file's tensors at once and copies them.)
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyllama.checkpoint import DTYPES, INDEX
from pyllama.config import ModelConfig
from pyllama.weights import WeightTable

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: what they will be, on the meta device, and how to make them."""

    tensors: dict[str, Tensor]
    make: Callable[[], dict[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def unstack(
    table: WeightTable, config: ModelConfig, parameter: str, value: Tensor, expert: int | None = None
) -> dict[str, Tensor]:
    """The tensors that the table makes the parameter of, by their names: the table read backwards.

    value: the parameter, or its slice for the expert `expert`. Returns views of it where its rows keep their order.
    Raises ValueError where no rule is for the parameter.
    """
    if (matching := table.rule_for(parameter)) is None:
        raise ValueError(f"no rule of the table is for {parameter}")
    rule, layer = matching
    if expert is None and "{e}" in rule.sources[0]:
        slices = (unstack(table, config, parameter, one, e) for e, one in enumerate(value))
        return {name: tensor for found in slices for name, tensor in found.items()}
    count = len(rule.sources)
    rows: Sequence[int] = [len(value) // count] * count
    if count > 1 and layer is not None and ".attention." in rule.target:
        rows = config.layers[int(layer)].attention.stacked
    tensors = value.split(list(rows))
    heads = rule.interleaved or (0,) * count
    return {
        source.format(i=layer, e=expert): _interleaved(tensor, head_dim) if head_dim else tensor
        for source, tensor, head_dim in zip(rule.sources, tensors, heads, strict=True)
    }


def _interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from the order of pairs (i, i + K/2) to that of pairs (2i, 2i + 1)."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def write_tensors(folder: Path, pieces: Sequence[Piece], max_shard_bytes: int, progress: Callable[[int], None]) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` (but for single pieces) and their index.

    progress: is told the bytes written. Raises OSError where the disk does not take them.
    """
    shards = list(_shards(pieces, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for n, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard, progress)
        weight_map |= {tensor: name for piece in shard for tensor in piece.tensors}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(piece.bytes for piece in pieces)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    """Each with its widest numbers first, so that every tensor begins at a multiple of its numbers' size."""
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.bytes > limit:
            yield sorted(shard, key=_width, reverse=True)
            shard, size = [], 0
        shard.append(piece)
        size += piece.bytes
    yield sorted(shard, key=_width, reverse=True)


def _width(piece: Piece) -> int:
    return min(tensor.itemsize for tensor in piece.tensors.values())


def _write(file: Path, pieces: Sequence[Piece], progress: Callable[[int], None]) -> None:
    """One safetensors file: the header's size, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        for name, tensor in piece.tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            _write_piece(out, piece, progress)
        os.fsync(out.fileno())


def _write_piece(out: BinaryIO, piece: Piece, progress: Callable[[int], None]) -> None:
    """By itself, so that nothing of a piece is left when the next is made."""
    for name, tensor in piece.make().items():
        assert (tensor.shape, tensor.dtype) == (piece.tensors[name].shape, piece.tensors[name].dtype)
        out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        progress(tensor.nbytes)
