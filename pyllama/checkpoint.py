"""Checkpoints: the files of a folder as named tensors, memory-mapped, so that reading one makes no copy of it.

What lies in a folder: one file, several with an index, or one for each rank of the tensor parallelism that the
publisher ran the model with, where a tensor is in pieces. Safetensors go before files of torch.save.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyllama.files import CheckpointError, check_file, damaged, few, printable
from pyllama.torch_file import MAX_DIMENSIONS, MAX_HEADER, NAMES, Stored, load_state_dict, read_headers

INDEX = "model.safetensors.index.json"
MAX_INDEX = 2**25  # bytes; DeepSeek-V3's has 9 MB

MODEL_DTYPES = {  # that a model may have, by torch's names
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
# Of safetensors' names those that are weights as they are. Other types come with scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT8 = "F8_E4M3"

_DTYPES = {"BOOL", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_DTYPES |= {"BF16", *(f"{kind}{bits}" for kind in "FIU" for bits in (8, 16, 32, 64))} - {"F8"}  # all of safetensors'

Headers = dict[str, tuple[tuple[int, ...], str]]  # of each tensor in a file: shape, data type


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The data type of a model, given itself or by torch's name. Raises ValueError for any other."""
    chosen = MODEL_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if (dtype is not None and chosen is None) or chosen not in (None, *MODEL_DTYPES.values()):
        raise ValueError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, got {dtype!r}")
    return chosen


@dataclass(frozen=True)
class Source:
    """An opened file: what it holds, and how a tensor is had as a view of it."""

    path: Path
    headers: Headers
    read: Callable[[str], Tensor]
    descriptor: int = -1
    offsets: Mapping[str, int] = field(default_factory=dict)  # of each tensor's bytes, in order and its own; or none


@dataclass(frozen=True)
class TensorInfo:
    """What the headers of its files say about one tensor; in several files lies a piece of it each, in order."""

    files: tuple[str, ...]
    shape: tuple[int, ...]  # of each piece
    dtype: str  # safetensors' name

    @property
    def torch_dtype(self) -> torch.dtype:
        """KeyError where it is none that weights have."""
        return torch.float8_e4m3fn if self.dtype == FLOAT8 else DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        """Of all pieces."""
        return len(self.files) * math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def piece_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # the name says them, but of BOOL
        return -(-math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8)

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return len(self.files) * self.piece_bytes


class Checkpoint:
    """The tensors of a folder's files."""

    def __init__(self, folder: Path, files: Mapping[str, Source], tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._files = files
        self.tensors = tensors

    @classmethod
    @contextmanager
    def open(cls, folder: Path, headers_only: bool = False) -> Iterator[Checkpoint]:
        """Opens the files of a folder, or the one file that `folder` is, and checks their headers.

        headers_only: nothing is mapped, so files may be larger than memory, and no tensor can be read. Raises
        CheckpointError for missing, damaged and unsafe files, MemoryError for one too large to be mapped.
        """
        found = find_files(folder)
        folder = folder.parent if folder.is_file() else folder
        with ExitStack() as stack:
            files: dict[str, Source] = {}
            tensors: dict[str, TensorInfo] = {}
            for name in found.names:
                check_file(folder / name)
                files[name] = found.layout.open(folder / name, stack, headers_only)
                for tensor, header in files[name].headers.items():
                    tensors[tensor] = _with_piece(tensors.get(tensor), tensor, TensorInfo((name,), *header), found)
            if partial := [name for name, info in tensors.items() if 1 < len(info.files) < len(found.names)]:
                raise CheckpointError(f"{folder}: neither in one file nor in all {len(found.names)}: {few(partial)}")
            if found.indexed is not None and (wrong := found.indexed ^ tensors.keys()):
                raise CheckpointError(
                    f"{folder / found.layout.index} and the headers of its files name different tensors: {few(wrong)}"
                )
            yield cls(folder, files, tensors)

    def read(self, name: str, piece: int = 0) -> Tensor:
        """The tensor, or a piece of it, on the CPU, as a view of its file: what is written to it stays in memory.

        It outlives the checkpoint. While it lives the file must not be cut or written to; replacing it is fine.
        """
        return self.source(name, piece).read(name)

    def source(self, name: str, piece: int = 0) -> Source:
        """The file that holds the tensor, or a piece of it."""
        return self._files[self.tensors[name].files[piece]]

    @property
    def dtype(self) -> torch.dtype:
        """The data type of most of the weights; bfloat16 for those of 8 bits, which are rounded from it."""
        weights: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in (*DTYPES, FLOAT8):
                weights[DTYPES.get(tensor.dtype, torch.bfloat16)] += tensor.bytes
        return weights.most_common(1)[0][0] if weights else torch.float32


def _with_piece(known: TensorInfo | None, name: str, piece: TensorInfo, found: Files) -> TensorInfo:
    if known is None:
        return piece
    files = f"{known.files[0]} and {piece.files[0]}"
    if not found.by_rank:
        raise CheckpointError(f"{printable(name)} is in both {files}")
    if (known.shape, known.dtype) != (piece.shape, piece.dtype):
        raise CheckpointError(
            f"the pieces of {printable(name)} in {files} differ: {known.dtype} {list(known.shape)} and "
            f"{piece.dtype} {list(piece.shape)}"
        )
    return replace(known, files=known.files + piece.files)


def _open_safetensors(file: Path, stack: ExitStack, headers_only: bool) -> Source:
    size = file.stat().st_size
    read: Callable[[str], Tensor] = read_nothing
    try:
        opened = stack.enter_context(file.open("rb"))
        length = int.from_bytes(opened.read(8), "little")
        if size >= length > MAX_HEADER:
            raise ValueError(f"its header of {length:,} bytes is larger than {MAX_HEADER:,}")
        if not headers_only:
            read = stack.enter_context(safe_open(file, framework="pt")).get_tensor
        elif length > size - 8:  # the library checks this, and what `check_header` does
            raise ValueError(f"its header of {length:,} bytes does not fit")
        header = json.loads(opened.read(length), object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        headers = {name: (tuple(values["shape"]), values["dtype"]) for name, values in header.items()}
        if wrong := [name for name, (shape, _) in headers.items() if any(n >= 2**63 for n in shape)]:
            raise ValueError(f"{few(wrong)} of impossible sizes")
        if headers_only:
            check_header(header, size - 8 - length)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, "safetensors file", error) from error
    except RuntimeError as error:  # Linux maps no file that is larger than the main memory
        raise MemoryError(f"{file} ({size:,} bytes) cannot be mapped: {error}") from error
    offsets = {name: 8 + length + values["data_offsets"][0] for name, values in header.items()}
    return Source(file, headers, read, opened.fileno(), offsets)


def check_header(header: dict[str, Any], size: int | None) -> None:
    """Raises ValueError, or what strange types raise, where the tensors are not end to end, from the beginning of
    `size` bytes to their end, or are not as large as their shapes say. size: None where nobody knows."""
    end = 0
    for name, values in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = values["data_offsets"]
        shape, dtype = values["shape"], values["dtype"]
        numbers = all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape))
        if not numbers or dtype not in _DTYPES or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{printable(name)} has no place, shape and type of a tensor")
        if start != end or stop - start != TensorInfo(("",), tuple(shape), dtype).bytes:
            raise ValueError(f"{printable(name)} is not where its neighbours end, or not as large as its shape")
        end = stop
    if size not in (None, end):
        raise ValueError(f"its tensors take {end:,} bytes, but there are {size:,}")


def read_nothing(name: str) -> Tensor:
    raise RuntimeError(f"{printable(name)} cannot be read: only headers were opened")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _open_torch(file: Path, stack: ExitStack, headers_only: bool) -> Source:
    tensors = {} if headers_only else load_state_dict(file)
    found: Mapping[str, Stored | Tensor] = read_headers(file)[1] if headers_only else tensors
    headers = {name: (tuple(tensor.shape), NAMES[tensor.dtype]) for name, tensor in found.items()}
    return Source(file, headers, read_nothing if headers_only else tensors.__getitem__)


@dataclass(frozen=True)
class Layout:
    """How the files of one format are named."""

    whole: str  # a checkpoint in one file; its index has ".index.json" appended
    by_rank: re.Pattern[str]  # the file of rank `rank`, of `ranks` where the name says so
    patterns: tuple[str, ...]
    open: Callable[[Path, ExitStack, bool], Source]  # True: headers only

    @property
    def index(self) -> str:
        return f"{self.whole}.index.json"


LAYOUTS = (
    Layout(
        "model.safetensors",
        re.compile(r"model(?P<rank>\d{1,4})-mp(?P<ranks>\d{1,4})\.safetensors"),  # DeepSeek's convert.py
        ("*.safetensors",),
        _open_safetensors,
    ),
    Layout(
        "pytorch_model.bin",
        re.compile(r"consolidated\.(?P<rank>\d{1,4})(?P<ranks>)\.pth"),  # Meta's
        ("*.bin", "*.pth", "*.pt"),
        _open_torch,
    ),
)
PATTERNS = ", ".join(pattern for layout in LAYOUTS for pattern in layout.patterns)


@dataclass(frozen=True)
class Files:
    """The files to read; `indexed`: the tensors that an index lists; `by_rank`: a tensor may be in all of them."""

    layout: Layout
    names: tuple[str, ...]
    indexed: frozenset[str] | None = None
    by_rank: bool = False


def find_files(folder: Path) -> Files:
    """Which of the folder's files hold its weights; a file holds its own. Raises CheckpointError where that is not
    clear."""
    if folder.is_file():
        return Files(_layout_of(folder), (folder.name,))
    for layout in LAYOUTS:
        names = sorted({path.name for pattern in layout.patterns for path in folder.glob(pattern)})
        if layout.whole in names:
            return Files(layout, (layout.whole,))
        if os.path.lexists(folder / layout.index):
            return _indexed_files(folder, layout)
        if ranked := [match for name in names if (match := layout.by_rank.fullmatch(name))]:
            return _files_by_rank(folder, layout, ranked)
        if len(names) == 1:
            return Files(layout, tuple(names))
        if names:
            raise CheckpointError(
                f"{folder} has {len(names)} files of weights and no {layout.index} to tell them apart: {few(names)}"
            )
    others = sorted(path.name for path in folder.glob("*.gguf"))
    raise CheckpointError(f"{folder} has no file of weights ({PATTERNS})" + (f", only {few(others)}" if others else ""))


def _layout_of(file: Path) -> Layout:
    """The layout whose files end as this one."""
    for layout in LAYOUTS:
        if any(file.match(pattern) for pattern in layout.patterns):
            return layout
    raise CheckpointError(f"{file} is no file of weights: its name must be one of {PATTERNS}")


def _files_by_rank(folder: Path, layout: Layout, found: list[re.Match[str]]) -> Files:
    files = {int(match["rank"]): match.string for match in found}
    ranks = {int(match["ranks"] or len(found)) for match in found}
    if len(ranks) > 1 or sorted(files) != list(range(max(ranks))) or len(files) < len(found):
        raise CheckpointError(
            f"{folder} has {few(files.values())}: not one file for each rank, from 0 to {max(*ranks, *files) - 1}"
        )
    return Files(layout, tuple(files[rank] for rank in sorted(files)), by_rank=True)


def _indexed_files(folder: Path, layout: Layout) -> Files:
    index = folder / layout.index
    check_file(index, MAX_INDEX)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {tensor: str(file) for tensor, file in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: no JSON object 'weight_map' ({error})") from error
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name or name == ".." or not name.isprintable()]:
        raise CheckpointError(f"{index} names files outside of its folder: {few(outside)}")
    if missing := [name for name in names if not os.path.lexists(folder / name)]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {layout.index} names: {few(missing)}"
        )
    return Files(layout, tuple(names), frozenset(files))
