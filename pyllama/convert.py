"""Any checkpoint that is read, written as Hugging Face safetensors: tensors of its family's names, and its config.json.

One parameter, or one expert's part of it, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyllama.architectures import find_family
from pyllama.checkpoint import DTYPES, Checkpoint, parse_dtype
from pyllama.config import ModelConfig
from pyllama.files import parse_size
from pyllama.loader import empty_model, find_folder, read_folder
from pyllama.save import Origin, Piece, new_target, unstack, write_checkpoint
from pyllama.transfer import copy_weights
from pyllama.weights import Part, WeightTable, check_tied, plan


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
    target, chosen, limit = new_target(folder), parse_dtype(dtype), parse_size("max_shard_size", max_shard_size)
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
        dtype = chosen or checkpoint.dtype
        write_checkpoint(target, pieces, limit, Origin(values, origin), config, dtype, "converting")


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
