"""`pyllama fit`: whether a model fits a device, and with what context and batch, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize

import torch

from pyllama.architectures import read_config
from pyllama.architectures.reader import ConfigError
from pyllama.bench.shapes import SHAPES
from pyllama.cache import PAGE_SIZE, bytes_per_page, free_memory, pages_for
from pyllama.checkpoint import LAYOUTS, Checkpoint, parse_dtype
from pyllama.config import ModelConfig
from pyllama.files import expanded, parse_size
from pyllama.inspection.headers import open_headers
from pyllama.inspection.workspace import Use, cublas_workspace, of_all_layers, one_of_each
from pyllama.loader import (
    check_kernels_take,
    check_tensors,
    configured_dtype,
    default_dtype,
    empty_model,
    local_folder,
    parameter_dtypes,
    parse_device,
    read_folder,
    target_device,
)
from pyllama.transfer import is_mapped, staged_bytes
from pyllama.weights import WeightTable, plan

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_BATCH = 1024  # that is looked for
MOST_LAYERS = 4096  # no model has a tenth, and of more the allocator alone would take many seconds
SHORTEST = 1024  # context of the table, of models that have more
# Of a GPU whose size is given: the CUDA context, kernels, what torch's allocator cannot use. As much as llama.cpp
# leaves free on every GPU (its --fit-target, 1024 MiB); of a GPU that is here, what is free is known.
RESERVE = 2**30
WEIGHTS = ("*.index.json", "*.gguf", *(pattern for layout in LAYOUTS for pattern in layout.patterns))


@dataclass(frozen=True)
class Cell:
    """So many sequences, of so many tokens in the end, prompt and new ones."""

    context: int
    batch: int
    cache_bytes: int
    # Activations, logits, tables, state, and what the allocator cannot use; None where it does not matter any more.
    workspace_bytes: int | None
    bytes: int  # in all; where weights and cache alone are too much, these two
    fits: bool


@dataclass(frozen=True)
class Fit:
    """What a model takes of a device; all sizes in bytes."""

    source: str
    device: str  # "cuda" or "cpu"
    dtype: str
    memory: int  # of the device, or what is free of it
    reserve: int  # of it, that is left alone
    parameters: int
    weight_bytes: int
    staged_bytes: int  # beside the weights, while loading converts them
    mapped_bytes: int  # of the weights, those that stay in their files, in the system's cache of which they are read
    cache_bytes_per_token: int
    max_positions: int  # the longest context that the model holds
    fits: bool  # a sequence of a page of the cache at least
    left: int  # beside reserve, weights and what loading takes; below 0: what lacks
    largest_context: int  # of one sequence
    largest_batches: dict[int, int]  # by context, `MOST_BATCH` at most
    cells: tuple[Cell, ...]


def fit(
    source: str | Path,
    memory: int | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    reserve: int | str | None = None,
    ignore_config_keys: Iterable[str] = (),
) -> Fit:
    """Computes from headers and configuration what loading and generating takes; nothing is loaded.

    source: a folder, with weights or with a config.json alone, a file of weights beside its config.json, a Hub id (of
    whose weights the headers alone are fetched), "demo", or the name of a shape that `pyllama bench` knows. memory: the
    device's, in bytes or as in "80GB"; None: what is free of the device here. device: None is a GPU where there is one
    here or `memory` is given, else the CPU. dtype: as for `pyllama.load`. contexts: of the table; None: powers of two
    up to the model's. reserve: of the memory, not to be used; None: `RESERVE` of a GPU's given memory, else nothing.

    What is counted is generating with sampling; penalties, log-probabilities and experts' loads take more. On a CPU
    the workspace is the least: bodies of ops take more while they run. Raises what `load` raises, but for
    weights that do not fit, and ValueError for sizes and contexts that are none.
    """
    target, free = _place(memory, device)
    default = RESERVE if memory is not None and target.type == "cuda" else 0
    kept = default if reserve is None else parse_size("reserve", reserve, least=0)
    chosen = parse_dtype(dtype)
    check_kernels_take(chosen, target)
    origin = _origin(source, ignore_config_keys)
    config, checkpoint = origin.config, origin.checkpoint
    if config.max_positions < 2:
        raise ConfigError(
            f"{source} holds {config.max_positions} token, prompt and new ones together: nothing can be generated"
        )
    if len(config.layers) > MOST_LAYERS:
        raise ConfigError(f"{source} describes {len(config.layers):,} layers, and {MOST_LAYERS:,} are the most here")
    if checkpoint is not None:
        check_tensors(config, len(checkpoint.tensors))
    model = empty_model(one_of_each(config), maxsize)  # its size was held against the files, if there are any
    parameters = of_all_layers(config, dict(model.named_parameters()))
    count = sum(parameter.numel() for parameter in parameters.values())
    if chosen is None:
        chosen = default_dtype(origin.dtype, count, target, free - kept)
        check_kernels_take(chosen, target)
    mapped = staged = 0
    if checkpoint is not None:
        dtypes = of_all_layers(config, parameter_dtypes(model, chosen))
        parts = plan(
            origin.table, {name: parameter.shape for name, parameter in parameters.items()}, checkpoint.tensors
        )
        if target.type == "cuda":
            staged = staged_bytes(parts, dtypes, checkpoint)
        else:
            of_files = [n for n, found in parts.items() if is_mapped(found, dtypes[n], checkpoint)]
            mapped = sum(parameters[name].numel() * dtypes[name].itemsize for name in of_files)
    use = Use(config, chosen, target.type, staged, cublas_workspace(target if memory is None else None))
    page, room, weights = bytes_per_page(config, chosen), free - kept, sum(use.weights)

    def kept_bytes(context: int, batch: int) -> int:
        """Of weights and cache; the last token is given out and never computed."""
        return weights + batch * pages_for(context - 1) * page

    def cell(context: int, batch: int) -> Cell:
        stays = kept_bytes(context, batch)
        total = stays if stays > room else use.generating(batch, context)
        return Cell(context, batch, stays - weights, None if stays > room else total - stays, total, total <= room)

    def largest_batch(context: int) -> int:
        most = (room - weights) // (kept_bytes(context, 1) - weights)
        return _largest(lambda batch: use.generating(batch, context), room, min(most, MOST_BATCH))

    longest, shown = config.max_positions, _contexts(contexts, config.max_positions)
    most_pages = min((room - weights) // page, pages_for(longest))
    pages = _largest(lambda pages: use.generating(1, min(pages * PAGE_SIZE, longest)), room, most_pages)
    return Fit(
        source=str(source),
        device=target.type,
        dtype=str(chosen).removeprefix("torch."),
        memory=free,
        reserve=kept,
        parameters=count,
        weight_bytes=weights,
        staged_bytes=staged,
        mapped_bytes=mapped,
        cache_bytes_per_token=page // PAGE_SIZE,
        max_positions=longest,
        fits=pages > 0,
        left=room - use.loaded(),
        largest_context=min(pages * PAGE_SIZE, longest),
        largest_batches={context: largest_batch(context) for context in shown},
        cells=tuple(cell(context, batch) for context in shown for batch in _batches(batches)),
    )


def _place(memory: int | str | None, device: torch.device | str | None) -> tuple[torch.device, int]:
    """The device, and the bytes of its memory that there are."""
    if memory is None:
        target = target_device(device)
        free = free_memory(target)
        if free == float("inf"):
            raise ValueError(f"the system does not say how much memory of {target} is free: say how much there is")
        return target, int(free)
    return parse_device(device or "cuda"), parse_size("memory", memory)


@dataclass(frozen=True)
class _Origin:
    config: ModelConfig
    dtype: torch.dtype  # of the weights
    table: WeightTable
    checkpoint: Checkpoint | None  # None: there are no weights


def _origin(source: str | Path, ignore_config_keys: Iterable[str]) -> _Origin:
    shape = source in SHAPES and not Path(source).exists()
    folder = None if shape or expanded(source).is_file() else local_folder(source)
    if shape:
        values = SHAPES[str(source)]
        config, table = read_config(values, ignore_config_keys)
    elif folder is not None and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        values, config, table = read_folder(folder, ignore_config_keys)
    else:
        folder, checkpoint = open_headers(source)
        _, config, table = read_folder(folder, ignore_config_keys)
        return _Origin(config, checkpoint.dtype, table, checkpoint)
    return _Origin(config, configured_dtype(values), table, None)


def _contexts(contexts: Sequence[int] | None, longest: int) -> list[int]:
    if contexts is None:
        powers = (2**power for power in range(SHORTEST.bit_length() - 1, longest.bit_length()))
        return sorted({*powers, longest})
    if wrong := [context for context in contexts if not 2 <= context <= longest]:
        raise ValueError(f"a context may have 2 to {longest} tokens, prompt and new ones together, got {wrong[0]}")
    return sorted(set(contexts))


def _batches(batches: Sequence[int]) -> list[int]:
    if wrong := [batch for batch in batches if not 1 <= batch <= MOST_BATCH]:
        raise ValueError(f"a batch may have 1 to {MOST_BATCH} sequences, got {wrong[0]}")
    return sorted(set(batches))


def _largest(size: Callable[[int], int], room: int, most: int) -> int:
    """The largest number up to `most` whose size is at most `room`, 0 if there is none; sizes grow with numbers."""
    if most < 1 or (first := size(1)) > room:
        return 0
    if (last := size(most)) <= room:
        return most
    low, high = (1, first), (most, last)
    even = True
    while (apart := high[0] - low[0]) > 1:
        # Sizes grow evenly, or nearly so: where they do, a few guesses do; where they do not, halving is sure.
        guess = low[0] + ((room - low[1]) * apart // (high[1] - low[1]) if even else apart // 2)
        middle = min(max(guess, low[0] + 1), high[0] - 1)
        found = middle, size(middle)
        low, high = (found, high) if found[1] <= room else (low, found)
        even = 2 * (high[0] - low[0]) <= apart or not even
    return low[0]
