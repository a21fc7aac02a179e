"""Folders made to do harm: nothing in them runs, nothing outside of them is read, memory and time stay small."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles import Pickle, archive
from shards import SAFETENSORS, TORCH, write
from tiny import byte_level_tokenizer, write_checkpoint

import pyllama
from pyllama.checkpoint import INDEX, Checkpoint
from pyllama.files import CheckpointError
from pyllama.tokenizer import Tokenizer

MARKER = "it ran"


def change(folder: Path, old: bytes, new: bytes) -> None:
    """Replaces bytes of the archive."""
    data = (folder / TORCH).read_bytes()
    assert old in data
    assert len(old) == len(new)
    (folder / TORCH).write_bytes(data.replace(old, new))


class Executes:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def executes(folder: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Executes(folder / MARKER)}, folder / TORCH)


def executes_through_an_attribute(folder: Path) -> None:
    """`numpy.f2py.diagnose.os.system` and its like: names with dots are names too."""
    command = f"touch '{folder / MARKER}'"
    Pickle().called("torch.serialization", "os.system", command).write(folder)


def key_that_hashes_forever(folder: Path) -> None:
    """A tuple of the last one twice, 100 times: 2^100 steps to hash, and a hundred objects."""
    bomb = Pickle().put(pickle.EMPTY_DICT, pickle.EMPTY_TUPLE)
    for n in range(100):
        bomb.put(pickle.BINPUT, bytes([n]), pickle.BINGET, bytes([n]), pickle.TUPLE2)
    bomb.put(pickle.NONE, pickle.SETITEM).write(folder)


def overlapping_records(folder: Path) -> None:
    """A directory whose thousand entries are all the same 1 MB."""
    with zipfile.ZipFile(folder / TORCH, "w") as file:
        file.writestr("root/data.pkl", Pickle().tensor().data)
        file.writestr("root/data/0", bytes(2**20))
        entry = file.infolist()[1]
        file.filelist += [entry] * 1000


def wrong_directory(field: str, value: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / TORCH, "w") as file:
            file.writestr("root/data/0", bytes(16))
            file.writestr("root/data.pkl", Pickle().tensor().data)
            setattr(file.infolist()[0], field, value)

    return make


def huge_directory(folder: Path) -> None:
    (folder / TORCH).write_bytes(
        b"PK\3\4" + bytes(2**24 + 60) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 2**24 + 64, 0, 0)
    )


def header(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SAFETENSORS).write_bytes(struct.pack("<Q", len(text)) + text)  # type: ignore[return-value]


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return make


def index(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_bytes(text)  # type: ignore[return-value]


def link(target: str, name: str = TORCH) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    # pickles that run code
    "os.system": (executes, r"would import posix.system\."),
    "eval": (lambda f: Pickle().called("builtins", "eval", f"open('{f / MARKER}', 'w')").write(f), r"builtins.eval\."),
    "dotted": (executes_through_an_attribute, r"would import torch.serialization.os.system\."),
    "getattr": (Pickle().called("builtins", "getattr", "a", "b").called("os", "x").write, "builtins.getattr, os.x"),
    "pickle in a pickle": (Pickle().called("torch.storage", "_load_from_bytes", "x").write, "torch.storage._load_from"),
    "stack global": (Pickle().text("os").text("system").put(b"\x93").write, "has the instruction STACK_GLOBAL"),
    "inst": (Pickle().put(b"(ios\nsystem\n").write, r"would import os.system\."),
    "extension": (Pickle().put(b"\x82\1").write, "has the instruction EXT1"),
    "new object": (Pickle().imported("torch", "FloatStorage").put(b")\x81").write, "has the instruction NEWOBJ"),
    "call of no function": (Pickle().put(b"}))R").write, "a call of tuple"),
    "attributes": (
        Pickle().called("collections", "OrderedDict").put(b"}").text("items").put(b"K\1sb").write,
        "attributes",
    ),
    # and such that take memory or time
    "bytearray": (Pickle().called("builtins", "bytearray", 10**12).write, "would import builtins.bytearray"),
    "torch.zeros": (Pickle().called("torch", "zeros", 10**12).write, "would import torch.zeros"),
    "storage of its own": (Pickle().called("torch.storage", "UntypedStorage", 10**12).write, "a call of _StorageType"),
    "meta": (Pickle().called("torch._utils", "_rebuild_meta_tensor_no_storage").write, "_rebuild_meta_tensor_no_stor"),
    "long bytes": (Pickle().put(b"\x8e" + b"\xff" * 6 + b"\0\0").write, "is not a complete file|BINBYTES8"),
    "bytearray8": (Pickle().put(b"\x96" + b"\xff" * 6 + b"\0\0").write, "is not a complete file|BYTEARRAY8"),
    "memo": (Pickle().text("x").put(b"r\xff\xff\xff\xff").put(b"0" * 2).write, "POP"),
    "hash": (key_that_hashes_forever, "a tuple as key"),
    "items of a dict": (
        Pickle().imported("collections", "OrderedDict").put(b"](").put(b")t\x85\x85R").write,
        "not a complete",
    ),
    "operations": (Pickle().put(pickle.EMPTY_DICT * 2**22).write, "over 2,097,152 pickled operations"),
    "long pickle": (Pickle().put(pickle.EMPTY_DICT * 2**24).write, "no record data.pkl of at most 16,777,216 bytes"),
    "empty stack": (lambda f: archive(f, {"data.pkl": b"\x80\2su."}), "is not a complete file of torch.save"),
    "no end": (lambda f: archive(f, {"data.pkl": b"\x80\2}"}), "is not a complete file of torch.save"),
    # tensors that are not where they say
    "beyond its storage": (Pickle().tensor(offset=1).write, "a tensor beyond the end of its storage"),
    "far beyond": (Pickle().tensor((2, 2), (2**62, 1)).write, "a tensor beyond the end of its storage"),
    "negative offset": (Pickle().tensor(offset=-1).write, "a tensor of impossible sizes"),
    "negative stride": (Pickle().tensor(strides=(-1,)).write, "a tensor of impossible sizes"),
    "negative size": (Pickle().tensor((-4,)).write, "a tensor of impossible sizes"),
    "beyond 64 bits": (Pickle().tensor((2**64,), (0,)).write, "a tensor of impossible sizes"),
    "strides missing": (Pickle().tensor((2, 2)).write, "is not a complete file of torch.save"),
    "storage too large": (Pickle().tensor(size=10**12).write, "record data/0 does not have the size of its storage"),
    "negative storage": (Pickle().tensor(size=-4).write, "record data/0 does not have the size of its storage"),
    "no such record": (Pickle().tensor(key="1").write, "is not a complete file of torch.save: 'data/1'"),
    "another record": (Pickle().tensor(key="../data.pkl").write, "is not a complete file of torch.save"),
    # archives that are not what they say
    "compressed": (lambda f: Pickle().tensor().write(f, compression=zipfile.ZIP_DEFLATED), "is a compressed archive"),
    "zip bomb": (lambda f: archive(f, {"data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED), "is a compressed archive"),
    "overlap": (overlapping_records, "overlaps the record before it"),
    "size": (wrong_directory("file_size", 10**9), "is a compressed archive"),
    "offset": (wrong_directory("header_offset", 10**9), "is not a complete file of torch.save"),
    "huge directory": (huge_directory, "its directory of 16,777,280 bytes is larger than"),
    "two of a name": (
        lambda f: (Pickle().tensor().write(f), change(f, b"version", b"data/0\0")),
        "does not belong there",
    ),
    "no archive": (lambda f: (f / TORCH).write_bytes(b"PK\3\4" + bytes(1000)), "does not end as an archive"),
    "end alone": (
        lambda f: (f / TORCH).write_bytes(b"PK\3\4PK\5\6" + bytes(18)),
        "is not a complete file of torch.save",
    ),
    "other byte order": (
        lambda f: archive(f, {"data.pkl": b"\x80\2}.", "byteorder": b"big"}),
        "was written on a machine of another byte order",
    ),
    # headers and indices
    "huge header": (header(b"{" + b" " * 2**24 + b"}"), "its header of 16,777,218 bytes is larger than 16,777,216"),
    "absent header": (lambda f: (f / SAFETENSORS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "is not a complete"),
    "many tensors": (
        header(
            b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}' % n for n in range(250_000)) + b"}"
        ),
        "is not a complete safetensors file",
    ),
    "huge index": (sparse(INDEX, 2**25 + 1), f"{INDEX} has 33,554,433 bytes, and no such file needs more"),
    "deep index": (index(b'{"weight_map":' * 10**6), "is damaged"),
    "outside": (index(b'{"weight_map": {"a": "../secret.bin"}}'), "names files outside of its folder: ../secret.bin"),
    # names that are no files, and links
    "pipe": (lambda f: os.mkfifo(f / SAFETENSORS), "model.safetensors is not a regular file"),
    "pipe as index": (lambda f: os.mkfifo(f / INDEX), "index.json is not a regular file"),
    "folder": (lambda f: (f / SAFETENSORS).mkdir(), "model.safetensors is not a regular file"),
    "endless device": (link("/dev/zero"), "pytorch_model.bin is not a regular file"),
    "endless device as index": (link("/dev/zero", INDEX), "index.json is not a regular file"),
    "link out": (link("/etc/passwd", SAFETENSORS), "is a link out of its folder, to /etc/passwd: only the Hub's cache"),
    "index out": (link("/etc/passwd", INDEX), "is a link out of its folder, to /etc/passwd"),
    "loop": (link(TORCH), "pytorch_model.bin is not a regular file"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error, Checkpoint.open(tmp_path):
        pass
    assert len(str(error.value)) < 1000
    assert not (tmp_path / MARKER).exists()


def test_what_the_cases_change_is_what_stops_them(tmp_path: Path) -> None:
    """The same file without the harm is read."""
    Pickle().tensor((2, 2), (1, 2)).write(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.zeros(2, 2))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_and_time_are_bounded(tmp_path: Path) -> None:
    """All cases one after the other, in a process whose memory does not grow by more than a large header takes."""
    for n, (make, _) in enumerate(CASES.values()):
        (tmp_path / f"{n}").mkdir()
        make(tmp_path / f"{n}")
    script = """
import sys
from pathlib import Path
from pyllama.checkpoint import Checkpoint
from pyllama.files import CheckpointError

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
for folder in sorted(Path(sys.argv[1]).iterdir(), key=lambda folder: int(folder.name)):
    try:
        with Checkpoint.open(folder):
            sys.exit(f"{folder} was read")
    except CheckpointError as error:
        pass
    print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    growth = dict(zip(CASES, map(int, result.stdout.split()), strict=True))
    assert max(growth.values()) < 400 * 2**20, growth
    assert not list(tmp_path.rglob(MARKER))


def test_an_expanded_tensor_takes_no_memory(tmp_path: Path) -> None:
    """Of 10^18 numbers and one in the file: only its shape is looked at, which is not the model's."""
    Pickle().tensor((10**9, 10**9), (0, 0)).write(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].shape == (10**9, 10**9)


def test_the_hub_s_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot's files are links to blobs, and so may be those of a folder made by older downloads."""
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    folder = tmp_path / "folder"
    for made in (blobs, snapshot, folder):
        made.mkdir(parents=True)
    write(blobs, {"a": torch.ones(2)})
    (blobs / SAFETENSORS).rename(blobs / ("ab" * 32))
    (snapshot / SAFETENSORS).symlink_to(f"../../blobs/{'ab' * 32}")
    (folder / SAFETENSORS).symlink_to(snapshot / SAFETENSORS)
    (tmp_path / "linked").symlink_to(snapshot)
    for opened in (snapshot, folder, tmp_path / "linked"):
        with Checkpoint.open(opened) as checkpoint:
            assert torch.equal(checkpoint.read("a"), torch.ones(2))


def test_a_link_within_the_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)}, whole="weights.safetensors")
    (tmp_path / SAFETENSORS).symlink_to("weights.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.ones(2))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: os.mkfifo(file), "is not a regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda file: file.symlink_to("/etc/passwd"), "is a link out of its folder, to /etc/passwd"),
        (
            lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 10**8 + 1),
            "has 100,000,001 bytes, and no such",
        ),
        (lambda file: file.write_text('{"a":' * 10**6), "is not"),
    ],
    ids=["pipe", "device", "link", "size", "depth"],
)
def test_the_other_files_too(make: Callable[[Path], object], message: str, name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer())
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        pyllama.load(tmp_path)


def test_a_template_s_file_stops_chats_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer())
    (tmp_path / "chat_template.jinja").symlink_to("/etc/passwd")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    with pytest.raises(ValueError, match="is a link out of its folder, to /etc/passwd"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
