"""From a checkpoint's files to parameters, each part the shortest way that will do.

A parameter on the CPU that is a tensor of a file, as it is, is mapped: nothing is read until it is used. What is
stacked goes from the file to its place, read by several threads (csrc/reader.h; to a GPU through pinned memory).
What is converted, put in another order or multiplied by scales is made by torch from the file's bytes: on the CPU
from views of the mapped file, on a GPU from bytes read into a bounded part of its memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from pyllama import _C
from pyllama.checkpoint import Checkpoint
from pyllama.files import CheckpointError, damaged
from pyllama.weights import BlockScales, Part

ALIGNMENT = 8  # bytes: of any number, and what files have whose header is padded, as safetensors' own are
STAGED_BYTES = 2**28  # on a GPU at a time, as they are in the file; one tensor may have more
DEVICE_THREADS = 16

Progress = Callable[[int], None]
Reader: TypeAlias = "_C.HostReader | _C.DeviceReader"  # the latter is in some builds only


def mapped_weights(
    parts: Mapping[str, list[Part]], dtypes: Mapping[str, torch.dtype], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Those of the parameters that are tensors of files as they are, in the data types wanted: views of the files.

    What is written to them stays in memory, and each is a tensor of its own: saved or pickled, the rest of its file
    is not. They outlive the checkpoint; until then the files must not be cut or written to (replacing them is fine).
    """
    found = {name: _as_it_is(parts[name], dtype, checkpoint) for name, dtype in dtypes.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _as_it_is(parts: Sequence[Part], dtype: torch.dtype, checkpoint: Checkpoint) -> Tensor | None:
    if not is_mapped(parts, dtype, checkpoint):
        return None
    tensor = checkpoint.read(parts[0].tensor)
    return torch.frombuffer(tensor.view(torch.uint8).numpy(), dtype=dtype).view(tensor.shape)


def is_mapped(parts: Sequence[Part], dtype: torch.dtype, checkpoint: Checkpoint) -> bool:
    """Whether a parameter is a tensor of a file as it is, and may be a view of it, as far as headers say."""
    info = checkpoint.tensors[parts[0].tensor]
    whole = len(parts) == 1 and parts[0].expert is None and len(info.files) == 1 and info.elements
    if not whole or not _in_order(parts[0].tensor, checkpoint) or not _is_as_stored(parts[0], dtype, checkpoint):
        return False
    return checkpoint.source(parts[0].tensor).offsets[parts[0].tensor] % ALIGNMENT == 0  # files begin at a page


def staged_bytes(parts: Mapping[str, list[Part]], dtypes: Mapping[str, torch.dtype], checkpoint: Checkpoint) -> int:
    """What is taken of a GPU beside the parameters while they are loaded: tensors that are converted there."""
    sizes = [
        sum(_padded(checkpoint.tensors[name].piece_bytes) for name, _ in _tensors(part, checkpoint))
        for name, found in parts.items()
        for part in found
        if not _is_as_stored(part, dtypes[name], checkpoint)
    ]
    return min(sum(sizes), max(STAGED_BYTES, *sizes)) if sizes else 0


def _in_order(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor's bytes lie in its files in order, and are no other tensor's: in safetensors they do."""
    return name in checkpoint.source(name).offsets


def _is_as_stored(part: Part, dtype: torch.dtype, checkpoint: Checkpoint) -> bool:
    """Whether the part's bytes in the file are those of its place, which has this data type."""
    return checkpoint.tensors[part.tensor].torch_dtype == dtype and not part.head_size


@dataclass(frozen=True)
class _Task:
    part: Part
    place: Tensor


def copy_weights(
    parts: Mapping[str, list[Part]], parameters: Mapping[str, Tensor], checkpoint: Checkpoint, progress: Progress
) -> None:
    """Brings every tensor to its place, in the parameter's data type; `progress` is told the bytes read.

    parameters: all on one device, where the work may still be under way, in order, on torch's current stream.
    Raises CheckpointError with the file's name where one cannot be read, or not to its end.
    """
    tasks = _tasks(parts, parameters)
    for task in tasks:
        if task.part.join is None:
            _check_copies(task.part.tensor, checkpoint, progress)
    if not tasks:
        return
    device = tasks[0].place.device
    reader = _reader(device)
    as_they_are: list[_Task] = []
    staged: list[_Task] = []
    viewed: list[_Task] = []
    for task in tasks:
        if reader is None or not _in_order(task.part.tensor, checkpoint):
            viewed.append(task)
        elif _is_as_stored(task.part, task.place.dtype, checkpoint):
            as_they_are.append(task)
        else:
            (viewed if device.type == "cpu" else staged).append(task)
    if reader is not None:
        _read(as_they_are, reader, checkpoint, progress)
        _make_on_device(_batches(staged, checkpoint, STAGED_BYTES), reader, checkpoint, progress)
    _make_from_views(viewed, checkpoint, torch.get_num_threads() if device.type == "cpu" else 1, progress)


def _tasks(parts: Mapping[str, list[Part]], parameters: Mapping[str, Tensor]) -> list[_Task]:
    tasks: list[_Task] = []
    for name, found in parts.items():
        for part in found:
            place = parameters[name] if part.expert is None else parameters[name][part.expert]
            tasks.append(_Task(part, place[part.start : part.start + part.rows]))
    return tasks


def _check_copies(name: str, checkpoint: Checkpoint, progress: Progress) -> None:
    """Raises CheckpointError where a tensor that several files hold as a whole is not the same in all."""
    files = checkpoint.tensors[name].files
    for piece in range(1, len(files)):
        if not torch.equal(checkpoint.read(name), checkpoint.read(name, piece)):
            raise CheckpointError(
                f"{name} should be the same in all files, and is not in {files[0]} and {files[piece]}"
            )
        progress(checkpoint.tensors[name].piece_bytes)


def _reader(device: torch.device) -> Reader | None:
    """What reads files into the device's memory; None where the build has nothing for it."""
    if device.type == "cpu":
        return _C.HostReader(torch.get_num_threads())
    return device_reader(device) if _C.cuda_version is not None else None


def device_reader(device: torch.device) -> _C.DeviceReader:
    """To a GPU's memory, after what torch's current stream there has to do. For builds with the CUDA runtime."""
    stream = torch.cuda.current_stream(device).cuda_stream
    return _C.DeviceReader(device.index, stream, min(DEVICE_THREADS, os.cpu_count() or 1))


class _Order:
    """What a reader is to read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files: dict[tuple[int, str], int] = {}
        self.pieces: list[tuple[int, int, int, int, int, int]] = []

    def add(self, name: str, piece: int, place: Tensor, join: int | None = None) -> None:
        """place: a piece of a tensor, cut out along the dimension `join`; else contiguous."""
        source = self.checkpoint.source(name, piece)
        file = self.files.setdefault((source.descriptor, str(source.path)), len(self.files))
        rows = math.prod(place.shape[:join]) if join else 1
        row = place.nbytes // max(rows, 1)
        pitch = place.stride(join - 1) * place.itemsize if join else row
        self.pieces.append((file, source.offsets[name], place.data_ptr(), rows, row, pitch))

    def read(self, reader: Reader, progress: Progress) -> None:
        try:
            reader.read(list(self.files), self.pieces, progress)
        except OSError as error:
            if error.filename is None:  # not the reader's, but of `progress`
                raise
            raise damaged(Path(error.filename), "safetensors file", OSError(error.strerror)) from error


def _read(tasks: list[_Task], reader: Reader, checkpoint: Checkpoint, progress: Progress) -> None:
    order = _Order(checkpoint)
    for task in tasks:
        for piece, target in enumerate(_targets(task, checkpoint)):
            order.add(task.part.tensor, piece, target, task.part.join)
    order.read(reader, progress)


def _make_on_device(
    batches: Iterable[tuple[list[_Task], int]], reader: Reader, checkpoint: Checkpoint, progress: Progress
) -> None:
    for batch, size in batches:
        staged = _stage(batch, size, reader, checkpoint)
        for task in batch:
            _make(task, checkpoint, staged.__getitem__)
            progress(_bytes(task.part, checkpoint))
        del staged  # its memory is the next batch's: the reader waits for what torch's stream does with it


def _stage(batch: list[_Task], size: int, reader: Reader, checkpoint: Checkpoint) -> dict[tuple[str, int], Tensor]:
    """What the tasks are made of, as it is in the files, in `size` bytes of their device's memory."""
    staging = torch.empty(size, dtype=torch.uint8, device=batch[0].place.device)
    order, staged, start = _Order(checkpoint), {}, 0
    for name, piece in (tensor for task in batch for tensor in _tensors(task.part, checkpoint)):
        info = checkpoint.tensors[name]
        raw = staging[start : start + info.piece_bytes]
        order.add(name, piece, raw)
        staged[name, piece] = raw.view(info.torch_dtype).view(info.shape)
        start += _padded(info.piece_bytes)
    order.read(reader, lambda _: None)
    return staged


def _batches(tasks: list[_Task], checkpoint: Checkpoint, limit: int) -> Iterator[tuple[list[_Task], int]]:
    """Tasks that are staged together, and the bytes that they need: at most `limit`, but for single ones."""
    batch: list[_Task] = []
    size = 0
    for task in tasks:
        needed = sum(_padded(checkpoint.tensors[name].piece_bytes) for name, _ in _tensors(task.part, checkpoint))
        if batch and size + needed > limit:
            yield batch, size
            batch, size = [], 0
        batch.append(task)
        size += needed
    if batch:
        yield batch, size


def _tensors(part: Part, checkpoint: Checkpoint) -> list[tuple[str, int]]:
    """What the part is made of: names and pieces."""
    names = [part.tensor, *([part.blocks.of(part.tensor)] if part.blocks else [])]
    pieces = 1 if part.join is None else len(checkpoint.tensors[part.tensor].files)
    return [(name, piece) for name in names for piece in range(pieces)]


def _padded(size: int) -> int:
    return -(-size // 256) * 256


def _make_from_views(tasks: list[_Task], checkpoint: Checkpoint, threads: int, progress: Progress) -> None:
    """Several tensors at once: a copy that torch divides among threads waits for the slowest, while others go on."""
    inference = torch.is_inference_mode_enabled()

    def make(task: _Task) -> int:
        with torch.inference_mode(inference), torch.no_grad():  # which hold for one thread
            _make(task, checkpoint, lambda tensor: checkpoint.read(*tensor))
        return _bytes(task.part, checkpoint)

    if threads == 1:  # in this thread, whose current stream on the GPU is the caller's
        for task in tasks:
            progress(make(task))
        return
    with ThreadPoolExecutor(threads) as pool:
        for size in pool.map(make, tasks):
            progress(size)


def _bytes(part: Part, checkpoint: Checkpoint) -> int:
    return checkpoint.tensors[part.tensor].piece_bytes * len(_tensors(replace(part, blocks=None), checkpoint))


def _targets(task: _Task, checkpoint: Checkpoint) -> Sequence[Tensor]:
    """Where the tensor's pieces go."""
    if task.part.join is None:
        return [task.place]
    return task.place.chunk(len(checkpoint.tensors[task.part.tensor].files), task.part.join)


def _make(task: _Task, checkpoint: Checkpoint, read: Callable[[tuple[str, int]], Tensor]) -> None:
    """Converts, orders and multiplies out what `read` gives of the part's tensor."""
    part = task.part
    for piece, target in enumerate(_targets(task, checkpoint)):
        tensor = read((part.tensor, piece))
        if part.blocks:
            tensor = _multiply_out(tensor, read((part.blocks.of(part.tensor), piece)), part.blocks, target)
        if K := part.head_size:  # pairs (2i, 2i + 1) of a head's rows become (i, i + K/2)
            target = target.unflatten(0, (-1, 2, K // 2))
            tensor = tensor.unflatten(0, (-1, K // 2, 2)).transpose(1, 2)
        target.copy_(tensor)


def _multiply_out(tensor: Tensor, scales: Tensor, blocks: BlockScales, like: Tensor) -> Tensor:
    """Each element times its block's scale, in float32; on `like`'s device and in its data type."""
    rows, columns = tensor.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    scales = scales.to(like.device, torch.float32).repeat_interleave(min(blocks.columns, columns), dim=1)[:, :columns]
    for start, scale in zip(range(0, rows, blocks.rows), scales, strict=True):
        band = slice(start, start + blocks.rows)
        out[band] = tensor[band].to(like.device).float() * scale
    return out
