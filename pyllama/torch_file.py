"""Files of `torch.save`: what they hold, found out without running or allocating anything.

Such a file is a zip archive of one pickle, which is a program, and of the storages that its tensors are views of.
torch.load(weights_only=True, mmap=True) runs only a few instructions of it, yet trusts the archive, and what those
instructions can be made to allocate. So archive and program are checked here first, and the tensors that torch
then returns are held against what was found. A state dict needs little: everything else is refused by name.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllama.files import CheckpointError, damaged, few, printable

MAX_HEADER = 2**24  # bytes of the pickle, and of the archive's directory: a hundred thousand tensors
MAX_DIMENSIONS = 64  # of a tensor, as many as torch has
MAX_OPERATIONS = 2**21  # of the pickle
_KIND = "file of torch.save"
WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # where training frameworks put the weights

# safetensors' names of data types.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch.storage UntypedStorage": torch.uint8,
}
_DTYPES = {f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in NAMES}


@dataclass(frozen=True)
class Stored:
    """What the pickle says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_headers(file: Path) -> tuple[str | None, dict[str, Stored]]:
    """The tensors of a state dict, which may lie one level deep, beside a training's other state; and the key it lies
    under. Neither torch nor the data are asked.

    Raises CheckpointError where the file is damaged, is in another format, or is more than a state dict.
    """
    with file.open("rb") as opened:
        records = _records(file, opened)
        start, size = records["data.pkl"]
        opened.seek(start)
        content = _Pickle(file, opened.read(size), records).run()
        if "byteorder" in records:
            start, size = records["byteorder"]
            opened.seek(start)
            if opened.read(min(size, 8)) != b"little":
                raise CheckpointError(f"{file} was written on a machine of another byte order, and cannot be mapped")
    return _weights(file, content)


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, memory-mapped.

    Raises CheckpointError as `read_headers` does, and MemoryError where the file is too large to be mapped.
    """
    wrapper, found = read_headers(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        loaded = loaded if wrapper is None else loaded[wrapper]
        tensors: dict[str, Tensor] = {name: loaded[name].detach() for name in found}
        if {name: Stored(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != found:
            raise ValueError("the archive can be read in two ways")
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if "mmap" in str(error):
            raise MemoryError(f"{file} ({file.stat().st_size:,} bytes) cannot be mapped: {error}") from error
        raise damaged(file, _KIND, error) from error
    return tensors


def _weights(file: Path, content: Any) -> tuple[str | None, dict[str, Stored]]:
    """The state dict, and the key it lies under."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {_kind(content)}, not a state dict: names and their tensors")
    wrappers = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if len(wrappers) > 1:
        raise CheckpointError(
            f"{file} holds a state dict under each of {few(wrappers)}, and nothing says which is the model: save one "
            f"of them by itself, torch.save(torch.load(file)[{wrappers[0]!r}], new_file)"
        )
    wrapper = wrappers[0] if wrappers else None
    found = content if wrapper is None else content[wrapper]
    # A number or a word beside the tensors says something about the training. Anything else could hold weights.
    others = {k: v for k, v in found.items() if not isinstance(v, Stored | str | int | float | None)}
    if others or not any(isinstance(value, Stored) for value in found.values()):
        entries = few([f"{k} ({_kind(v)})" for k, v in (others or found).items()]) or "nothing"
        raise CheckpointError(
            f"{file} is not a state dict, names and their tensors, nor has it one under {', '.join(WRAPPERS)}: "
            f"it holds {entries}"
        )
    tensors = {name: value for name, value in found.items() if isinstance(value, Stored)}
    if wrong := [str(name) for name in tensors if not isinstance(name, str)]:
        raise CheckpointError(f"{file} has tensors whose names are not text: {few(wrong)}")
    return wrapper, tensors


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Stored) else type(value).__name__


def _records(file: Path, opened: Any) -> dict[str, tuple[int, int]]:
    """Where each record of the archive lies, in bytes from the file's start, and its size.

    They are stored as they are, lie one after the other and fill no more than the file.
    """
    size = opened.seek(0, 2)
    opened.seek(0)
    if opened.read(4) != b"PK\3\4":
        raise CheckpointError(
            f"{file} ({size:,} bytes) is not a complete file of torch.save, or in its format of before 1.6, which "
            "cannot be mapped. torch.save(torch.load(file, weights_only=True), new_file) writes today's format"
        )
    try:
        end_of_data = _directory(opened, size)
        with zipfile.ZipFile(opened) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{file} is a TorchScript archive, a program and not a state dict")
        records: dict[str, tuple[int, int]] = {}
        root, end = entries[0].filename.split("/")[0], 0
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise CheckpointError(
                    f"{file} is a compressed archive; torch.save stores tensors as they are, which can be mapped"
                )
            if entry.header_offset < end:
                raise ValueError(f"{entry.filename} overlaps the record before it")
            opened.seek(entry.header_offset)
            fields = struct.unpack("<4s5H3I2H", opened.read(30))
            name = opened.read(fields[-2])
            if fields[0] != b"PK\3\4" or fields[3] != zipfile.ZIP_STORED or name != entry.orig_filename.encode():
                raise ValueError(f"{entry.filename} is another record than the archive's directory says")
            start = entry.header_offset + 30 + fields[-2] + fields[-1]
            end = start + entry.file_size
            name_in_root = entry.filename.removeprefix(f"{root}/")
            if end > end_of_data or entry.flag_bits & 1 or name_in_root in records or name_in_root == entry.filename:
                raise ValueError(f"{entry.filename} does not belong there")
            records[name_in_root] = start, entry.file_size
    except CheckpointError:
        raise
    # Besides what zipfile says of damage: IndexError of an empty archive, the others of offsets beyond the file.
    except (zipfile.BadZipFile, ValueError, struct.error, IndexError, OSError, OverflowError, RuntimeError) as error:
        raise damaged(file, _KIND, error) from error
    if records.get("data.pkl", (0, 0))[1] not in range(1, MAX_HEADER + 1):
        raise CheckpointError(f"{file} has no record data.pkl of at most {MAX_HEADER:,} bytes, as a state dict has")
    return records


def _directory(opened: Any, size: int) -> int:
    """Where the archive's directory begins. ValueError where it is too large to be read, or not at the file's end."""
    end = size - 22
    opened.seek(end)
    mark, _, _, _, _, length, start, comment = struct.unpack("<4s4H2IH", opened.read(22))
    if mark != b"PK\5\6" or comment:
        raise ValueError("it does not end as an archive of torch.save does")
    opened.seek(max(end - 20, 0))
    mark, _, wide_end, _ = struct.unpack("<4sIQI", opened.read(20))
    if mark == b"PK\6\7":  # for files beyond 4 GB; torch.save always writes it
        end = wide_end
        opened.seek(end)
        *_, length, start = struct.unpack("<4sQ2H2I4Q", opened.read(56))
    if length > MAX_HEADER:
        raise ValueError(f"its directory of {length:,} bytes is larger than {MAX_HEADER:,}")
    if start + length != end:
        raise ValueError("its directory does not lie at its end")
    return int(start)


class _Pickle:
    """The few instructions of pickles that a state dict needs, on descriptions instead of tensors."""

    def __init__(self, file: Path, data: bytes, records: Mapping[str, tuple[int, int]]) -> None:
        self.file = file
        self.data = data
        self.records = records
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
                if count == MAX_OPERATIONS:
                    raise CheckpointError(f"{self.file} is more than a state dict: over {count:,} pickled operations")
                self._step(opcode.name, argument)
            return self.stack.pop()
        except CheckpointError:
            raise
        # An empty stack, an unknown memo, a list where a dict belongs, bytes that are no instruction.
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise damaged(self.file, _KIND, error) from error

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                if argument != 2:
                    raise CheckpointError(f"{self.file} is pickled by protocol {argument}; torch.save's own is 2")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._last(int(name[-1]))))
            case "APPEND" | "APPENDS":
                items = self._last(1) if name == "APPEND" else self._marked()
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = self._last(2) if name == "SETITEM" else self._marked()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # Tuples are kept out: hashing one that holds itself twice, many times over, never ends.
                    if not isinstance(key, str | int | float | None):
                        raise TypeError(f"a {type(key).__name__} as key")
                    dict.__setitem__(stack[-1], key, value)
            case "GLOBAL":
                if argument not in _GLOBALS:
                    raise self._needs()
                stack.append(_GLOBALS[argument])
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "REDUCE":
                function, arguments = self._last(2)
                if not isinstance(function, _Function):
                    raise TypeError(f"a call of {type(function).__name__}")
                stack.append(function.call(*arguments))
            case "BUILD":  # a state dict's own attribute, with the versions of its modules
                state = stack.pop()
                if not isinstance(stack[-1], dict) or not isinstance(state, dict) or state.keys() - {"_metadata"}:
                    raise TypeError("attributes that no state dict has")
            case "STOP":
                pass
            case _:
                raise self._needs(f"the instruction {name}")

    def _last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("an empty stack")
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _storage(self, kind: str, dtype: Any, key: str, location: str, size: int) -> _Storage:
        if kind != "storage" or not isinstance(dtype, _StorageType) or type(size) is not int:
            raise TypeError("a persistent id that is no storage")
        if self.records[f"data/{key}"][1] != size * dtype.dtype.itemsize:
            raise ValueError(f"record data/{printable(key)} does not have the size of its storage")
        return _Storage(dtype.dtype, size)

    def _needs(self, what: str = "") -> CheckpointError:
        """The exception for a program that does more than a state dict's: all names that it would import."""
        names = []
        try:
            for opcode, argument, _ in pickletools.genops(self.data):
                if opcode.name in ("GLOBAL", "INST") and argument not in _GLOBALS:
                    names.append(str(argument).replace(" ", "."))
        except ValueError:  # what follows is damaged
            pass
        needs = f"its pickle would import {few(set(names))}" if names else f"its pickle has {what}"
        return CheckpointError(
            f"{self.file} is more than a state dict: {needs}. Only what plain tensors need is run, since more could be "
            "any code. If you trust the file, save its state dict alone, with torch.save or as safetensors"
        )


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    size: int  # in elements


@dataclass(frozen=True)
class _Function:
    """Stands for what the pickle calls."""

    call: Callable[..., Any]


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Stored:
    """As torch's `_rebuild_tensor_v3`; raises where the tensor is not within its storage."""
    size = storage.size * storage.dtype.itemsize // dtype.itemsize
    numbers = all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *strides))
    if metadata or not numbers or len(shape) > MAX_DIMENSIONS or prod(shape) >= 2**63:
        raise ValueError("a tensor of impossible sizes")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= size:
        raise ValueError("a tensor beyond the end of its storage")
    return Stored(tuple(shape), dtype)


def _empty() -> dict[Any, Any]:
    """An OrderedDict, of nothing: items come one by one, so that their keys are checked."""
    return {}


_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _Function(_empty),
    "torch._utils _rebuild_tensor_v2": _Function(
        lambda storage, offset, shape, strides, grad, hooks, metadata=None: _tensor(
            storage, offset, shape, strides, grad, hooks, storage.dtype, metadata
        )
    ),
    "torch._utils _rebuild_tensor_v3": _Function(_tensor),
    "torch._utils _rebuild_parameter": _Function(lambda tensor, grad, hooks: tensor),
    **{name: _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **_DTYPES,
}
