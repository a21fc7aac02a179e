"""Any checkpoint that is read, written as Hugging Face safetensors: tensors of its family's names, and its config.json.

One parameter, or one expert's part of it, is in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllama.architectures import find_family
from pyllama.checkpoint import DTYPES, Checkpoint
from pyllama.config import ModelConfig
from pyllama.files import check_file, parse_size
from pyllama.loader import empty_model, find_folder, parse_dtype, progress_bar, read_folder
from pyllama.save import Piece, unstack, write_tensors
from pyllama.transfer import copy_weights
from pyllama.weights import Part, WeightTable, check_tied, plan

# Beside config.json and the weights: tokenizer, chat template, generation_config.json, licence.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", "params.json", "*.index.json")


def convert(
    source: str | Path,
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    ignore_config_keys: Iterable[str] = (),
) -> None:
    """Writes the checkpoint `source` to `folder` in Hugging Face's layout, with the same results when loaded.

    source, ignore_config_keys: as for `pyllama.load`. folder: is made, and must be empty if it is there; what is
    written appears in it when all is done. dtype: "float32", "bfloat16", "float16" or "float64"; None keeps each
    tensor's own, except that weights of 8 bits take that of the others. max_shard_size: of each file, bytes or as
    in "5GB" (10^9 bytes each) or "5GiB" (2^30).

    Raises what `pyllama.load` raises, FileExistsError where something is in the folder, and OSError where the disk
    has no room.
    """
    target = Path(folder).expanduser().resolve()
    chosen, limit = parse_dtype(dtype), parse_size("max_shard_size", max_shard_size)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder, and nothing is written over")
    origin = find_folder(source, ignore_config_keys)
    values, config, table = read_folder(origin, ignore_config_keys)
    names = find_family(values).weights(config)
    with Checkpoint.open(origin) as checkpoint:
        parameters = dict(empty_model(config, len(checkpoint.tensors)).named_parameters())
        parts = plan(table, {name: p.shape for name, p in parameters.items()}, checkpoint.tensors)
        check_tied(table, parts, checkpoint)
        pieces: list[Piece] = []
        for name, parameter in parameters.items():
            own = _dtype(parts[name], checkpoint) if chosen is None else chosen
            if not parameter.requires_grad:  # as in loading
                own = torch.promote_types(own, torch.float32)
            pieces += _pieces(names, config, name, parameter.to(own), parts[name], checkpoint)
        size = sum(piece.bytes for piece in pieces)
        with _new_folder(target, size) as new, progress_bar("converting", size) as advance:
            write_tensors(new, pieces, limit, advance)
            _copy_files(origin, new)
            values = _config_json(values, config, chosen or checkpoint.dtype)
            (new / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _pieces(
    names: WeightTable, config: ModelConfig, name: str, parameter: Tensor, parts: list[Part], checkpoint: Checkpoint
) -> Iterator[Piece]:
    """The parameter's tensors under the names of `names`, expert by expert where it is stored so."""
    experts: dict[int | None, list[Part]] = {}
    for part in parts:
        experts.setdefault(part.expert, []).append(replace(part, expert=None))
    for expert, found in experts.items():
        empty = parameter if expert is None else parameter[expert]

        def make(empty: Tensor = empty, found: list[Part] = found, expert: int | None = expert) -> dict[str, Tensor]:
            filled = torch.empty_like(empty, device="cpu")
            copy_weights({name: found}, {name: filled}, checkpoint, lambda _: None)
            return unstack(names, config, name, filled, expert)

        yield Piece(unstack(names, config, name, empty, expert), make)


def _dtype(parts: list[Part], checkpoint: Checkpoint) -> torch.dtype:
    """A type that holds every part as it is; the checkpoint's own for parts of 8 bits with scales."""
    dtypes = [DTYPES.get(checkpoint.tensors[part.tensor].dtype, checkpoint.dtype) for part in parts]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


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
    new = target.with_name(f".{target.name}.{os.getpid()}.partial")
    new.mkdir()
    try:
        yield new
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
