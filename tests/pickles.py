"""Files of torch.save made by hand: their pickles instruction by instruction, their archives record by record."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from shards import TORCH


class Pickle:
    """A pickle, written instruction by instruction; `end` is what it returns."""

    def __init__(self) -> None:
        self.data = pickle.PROTO + b"\2"

    def put(self, *parts: bytes) -> Pickle:
        self.data += b"".join(parts)
        return self

    def text(self, value: str) -> Pickle:
        encoded = value.encode()
        return self.put(pickle.BINUNICODE, struct.pack("<I", len(encoded)), encoded)

    def integer(self, value: int) -> Pickle:
        encoded = pickle.encode_long(value)
        return self.put(pickle.LONG1, bytes([len(encoded)]), encoded)

    def integers(self, values: tuple[int, ...]) -> Pickle:
        self.put(pickle.MARK)
        for value in values:
            self.integer(value)
        return self.put(pickle.TUPLE)

    def imported(self, module: str, name: str) -> Pickle:
        return self.put(pickle.GLOBAL, f"{module}\n{name}\n".encode())

    def called(self, module: str, name: str, *arguments: int | str) -> Pickle:
        self.imported(module, name).put(pickle.MARK)
        for argument in arguments:
            self.integer(argument) if isinstance(argument, int) else self.text(argument)
        return self.put(pickle.TUPLE, pickle.REDUCE)

    def tensor(
        self,
        shape: tuple[int, ...] = (4,),
        strides: tuple[int, ...] = (1,),
        offset: int = 0,
        size: int = 4,
        key: str = "0",
    ) -> Pickle:
        """A float32 tensor of a storage of `size` numbers."""
        self.imported("torch._utils", "_rebuild_tensor_v2").put(pickle.MARK, pickle.MARK)
        self.text("storage").imported("torch", "FloatStorage").text(key).text("cpu").integer(size)
        self.put(pickle.TUPLE, pickle.BINPERSID).integer(offset).integers(shape).integers(strides)
        self.put(pickle.NEWFALSE).called("collections", "OrderedDict")
        return self.put(pickle.TUPLE, pickle.REDUCE)

    def write(self, folder: Path, **options: Any) -> None:
        """The state dict {"a": what the instructions left}, and a storage of 4 numbers."""
        data = self.data.replace(b"\2", b"\2" + pickle.EMPTY_DICT + b"X\1\0\0\0a", 1) + pickle.SETITEM + pickle.STOP
        archive(folder, {"data.pkl": data, "version": b"3\n", "data/0": bytes(16)}, **options)


def archive(folder: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / TORCH, "w", compression) as file:
        for name, data in records.items():
            file.writestr(f"root/{name}", data)
