"""Writing a checkpoint: parameters back under their tensors' names, in safetensors files that are filled as they come.

A file's header needs shapes only, which the same functions give for tensors on the meta device. So the files are
planned whole, and then written one tensor after the other: no more than a piece of the model is in memory.
(safetensors' own `save_file` takes a file's tensors at once and copies them.)
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from pyllama.architectures import find_family
from pyllama.checkpoint import DTYPES, INDEX, parse_dtype
from pyllama.config import ModelConfig
from pyllama.files import check_file, expanded, parse_size
from pyllama.progress import progress_bar
from pyllama.weights import WeightTable

# Beside config.json and the weights: tokenizer, chat template, generation_config.json, licence.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", "params.json", "*.index.json")
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


@dataclass(frozen=True)
class Origin:
    """What a checkpoint holds beside its weights."""

    values: Mapping[str, Any]  # of config.json, in its family's keys
    folder: Path | None  # with the tokenizer's files; None: there are none


def save_model(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    origin: Origin | None,
    folder: str | Path,
    dtype: torch.dtype | str | None,
    max_shard_size: int | str,
) -> None:
    """`Model.save`, for the model's parameters by name."""
    if origin is None:
        raise ValueError(
            "the model was not loaded, so it has no config.json: set model.origin to a pyllama.save.Origin"
        )
    chosen, limit = parse_dtype(dtype), parse_size("max_shard_size", max_shard_size)
    names = find_family(dict(origin.values)).weights(config)
    sharded = any(map(is_sharded, parameters.values()))
    pieces = []
    for name, parameter in parameters.items():
        by_expert = parameter.ndim == 3 and not sharded  # a layer's experts are too many for one piece
        parts = enumerate(parameter) if by_expert else [(None, parameter)]
        pieces += [_piece(names, config, name, part, chosen, expert) for expert, part in parts]
    own = next(iter(parameters.values())).dtype

    def write(pieces: Sequence[Piece]) -> None:
        write_checkpoint(new_target(folder), pieces, limit, origin, config, chosen or own, "saving")

    if not sharded:
        write(pieces)
    elif dist.get_rank() == 0:
        _write_asking(pieces, write)
    else:
        _give(list(chain.from_iterable(_shards(pieces, limit))))


def _write_asking(pieces: Sequence[Piece], write: Callable[[Sequence[Piece]], None]) -> None:
    """In the first process: asks the others for their parts of each piece, and tells them how it ended."""

    def asking(make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        _told("next")
        return make()

    end = "failed"
    try:
        write([replace(piece, make=partial(asking, piece.make)) for piece in pieces])
        end = "done"
    finally:
        _told(end)


def _give(pieces: Sequence[Piece]) -> None:
    """In the others: gives what is asked for. pieces: in the order in which they are written."""
    for piece in pieces:
        if _told() == "failed":
            break
        piece.make()
    else:
        if _told() == "done":
            return
    raise RuntimeError("the first process could not save the model; its own error says why")


def _told(word: str | None = None) -> str | None:
    """What the first process says to all."""
    words = [word]
    dist.broadcast_object_list(words)
    return words[0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import where nobody else has."""
    return hasattr(tensor, "full_tensor")


def _piece(
    names: WeightTable,
    config: ModelConfig,
    parameter: str,
    value: Tensor,
    dtype: torch.dtype | None,
    expert: int | None,
) -> Piece:
    """A parameter's tensors, or those of one of its experts, in the data type asked for.

    Correction biases are no coarser than float32, as they are loaded.
    """
    dtype = value.dtype if dtype is None else dtype
    if parameter.endswith(".correction_bias"):
        dtype = torch.promote_types(dtype, torch.float32)

    def make() -> dict[str, Tensor]:
        whole: Tensor = getattr(value, "full_tensor")() if is_sharded(value) else value  # noqa: B009
        return unstack(names, config, parameter, whole.detach().to("cpu", dtype), expert)

    empty = torch.empty(value.shape, dtype=dtype, device="meta")
    return Piece(unstack(names, config, parameter, empty, expert), make)


def new_target(folder: str | Path) -> Path:
    """The folder to write, which must be empty if it is there."""
    target = expanded(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder, and nothing is written over")
    return target


def write_checkpoint(
    target: Path,
    pieces: Sequence[Piece],
    max_shard_bytes: int,
    origin: Origin,
    config: ModelConfig,
    dtype: torch.dtype,
    doing: str,
) -> None:
    """Weights, config.json and the origin's other files; all of them, or nothing."""
    size = sum(piece.bytes for piece in pieces)
    with _new_folder(target, size) as new, progress_bar(doing, size) as advance:
        if origin.folder is not None:
            if not origin.folder.is_dir():
                raise FileNotFoundError(f"{origin.folder}, whose tokenizer belongs to the model, is not there any more")
            _copy_files(origin.folder, new)
        values = _config_json(origin.values, config, dtype)
        (new / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_tensors(new, pieces, max_shard_bytes, advance)


def _config_json(values: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for what is written: its data type, nothing of how it was stored, no layers that are left out."""
    left_out = {"quantization_config", "auto_map", "dtype", "torch_dtype"}
    written = {key: value for key, value in values.items() if key not in left_out}
    written["dtype" if "dtype" in values else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if config.extra_layers:
        written["num_nextn_predict_layers"] = 0
    return written


def _copy_files(origin: Path, target: Path) -> None:
    for file in sorted({file for pattern in COPIED for file in origin.glob(pattern)}):
        if not file.is_dir() and not any(file.match(pattern) for pattern in NOT_COPIED):
            check_file(file)
            shutil.copyfile(file, target / file.name)


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder beside the target, which becomes the target when all is well and goes when anything is not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(f"{target} would take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as around:
        new = Path(around) / target.name
        new.mkdir()
        yield new
        new.rename(target)
