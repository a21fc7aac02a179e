"""What reads weights (csrc/reader.h): every byte in its place, whatever the pieces; and what becomes of errors.

The reader to the GPU's memory runs here too, on the emulator's CUDA runtime, where copies are as late as CUDA allows.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from emulated import EMULATOR
from torch import Tensor

from pyllama import _C

OUT_OF_MEMORY, UNKNOWN = 2, 999  # CUDA's numbers of errors


@dataclass(frozen=True)
class Readers:
    """One kind of reader: how it is made, and on which device its places are."""

    make: Callable[..., Any]  # of threads, chunk
    device: str = "cpu"
    library: ctypes.CDLL | None = None


@pytest.fixture(
    params=[
        "host",
        "emulated-host",
        "emulated-device",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(
                    not torch.cuda.is_available() or _C.cuda_version is None, reason="needs a GPU and nvcc's build"
                ),
            ],
        ),
    ]
)
def readers(request: pytest.FixtureRequest) -> Readers:
    if request.param == "host":
        return Readers(_C.HostReader)
    if request.param == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
        return Readers(lambda threads, chunk, buffers=2: _C.DeviceReader(0, stream, threads, buffers, chunk), "cuda")
    emulator = request.config.stash[EMULATOR]
    if emulator is None:
        pytest.skip("no emulated kernels")
    if request.param == "emulated-host":
        return Readers(emulator.module.HostReader)
    return Readers(
        lambda threads, chunk, buffers=2: emulator.module.DeviceReader(0, 0, threads, buffers, chunk),
        library=ctypes.CDLL(str(emulator.path)),
    )


@pytest.fixture
def device(readers: Readers) -> Readers:
    """Readers to a device alone."""
    if readers.device == "cpu" and readers.library is None:
        pytest.skip("of the host")
    return readers


def write_random(folder: Path, *sizes: int) -> list[tuple[int, str]]:
    """Files of random bytes, opened."""
    files = []
    for n, size in enumerate(sizes):
        path = folder / f"file-{n}"
        path.write_bytes(random.Random(n).randbytes(size))
        files.append((os.open(path, os.O_RDONLY), str(path)))
    return files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[tuple[int, str]]]:
    opened = write_random(tmp_path, 10_007, 1, 65_536)
    yield opened
    for descriptor, _ in opened:
        os.close(descriptor)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    torch.ones(10**6).sum()  # starts torch's own threads, and the next line a sanitizer's
    first = Thread(target=int)
    first.start()
    first.join()
    before = threads()
    yield
    assert threads() <= before


@pytest.mark.parametrize("seed", range(8))
def test_every_byte_reaches_its_place_and_no_other(seed: int, readers: Readers, files: list[tuple[int, str]]) -> None:
    """Whole pieces and rows apart, read by threads in chunks that fit neither; each reader twice."""
    draw = random.Random(seed)
    reader = readers.make(draw.choice([1, 2, 5]), draw.choice([1 if readers.library else 7, 64, 1000, 4096, 2**20]))
    for _ in range(2):
        sources = [Path(name).read_bytes() for _, name in files]
        expected = bytearray(b"\xa5" * 400_000)
        pieces, end, total = [], 0, 0
        place = torch.full((len(expected),), 0xA5, dtype=torch.uint8, device=readers.device)
        for _ in range(draw.choice([0, 1, 12])):
            file = draw.randrange(len(files))
            rows = draw.choice([0, 1, 1, 3, 40])
            row = min(draw.choice([0, 1, 50, 700, 10_000]), len(sources[file]) // max(rows, 1))
            pitch = row + draw.choice([0, 0, 13])
            offset = draw.randint(0, len(sources[file]) - rows * row)
            end += draw.choice([0, 1, 9])
            pieces.append((file, offset, place.data_ptr() + end, rows, row, pitch))
            for n in range(rows):
                start = end + n * pitch
                expected[start : start + row] = sources[file][offset + n * row : offset + (n + 1) * row]
            end += rows * pitch
            total += rows * row
        assert end <= len(expected)
        progress: list[int] = []
        reader.read(files, pieces, progress.append)
        assert bytes(place.cpu().numpy()) == bytes(expected)
        assert sum(progress) == total


def whole(place: Tensor, file: int = 0) -> list[tuple[int, int, int, int, int, int]]:
    return [(file, 0, place.data_ptr(), 1, place.nbytes, place.nbytes)]


def test_a_file_that_was_cut_is_named(readers: Readers, files: list[tuple[int, str]]) -> None:
    place = torch.empty(10_007, dtype=torch.uint8, device=readers.device)
    os.truncate(files[0][1], 5000)
    with pytest.raises(OSError, match=r"ends at byte 5000, .* more are: it was cut while it was read") as error:
        readers.make(3, 100).read(files, whole(place), lambda _: None)
    assert (error.value.errno, error.value.filename) == (errno.EIO, files[0][1])


def test_what_cannot_be_read_is_named(readers: Readers, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    place = torch.empty(10, dtype=torch.uint8, device=readers.device)
    try:
        with pytest.raises(IsADirectoryError) as error:
            readers.make(2, 4).read([(folder, "some name")], whole(place), lambda _: None)
        assert error.value.filename == "some name"
    finally:
        os.close(folder)
    with pytest.raises(OSError, match="Bad file descriptor: 'gone'"):
        readers.make(2, 4).read([(folder, "gone")], whole(place), lambda _: None)


def test_what_progress_raises_stops_all(readers: Readers, files: list[tuple[int, str]]) -> None:
    place = torch.empty(65_536, dtype=torch.uint8, device=readers.device)

    def fail(_: int) -> None:
        raise KeyError("enough")

    reader = readers.make(2, 100)
    with pytest.raises(KeyError, match="enough"):
        reader.read(files, whole(place, 2), fail)
    reader.read(files, whole(place, 2), lambda _: None)  # which works again
    assert bytes(place.cpu().numpy()) == Path(files[2][1]).read_bytes()


def test_signals_interrupt(readers: Readers, tmp_path: Path) -> None:
    """What would take minutes: a file of zeros, 2 TB of it, into the same place."""
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(2**30)
    place = torch.empty(2**22, dtype=torch.uint8, device=readers.device)
    pieces = [(0, offset, place.data_ptr(), 1, 2**22, 2**22) for offset in range(0, 2**30, 2**22)] * 2**11

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    read: list[int] = []
    try:
        with path.open("rb") as file:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):  # one thread: they would write to the same place
                readers.make(1, 2**20).read([(file.fileno(), "zeros")], pieces, read.append)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert sum(read) < 2**41


@pytest.mark.parametrize("sizes", [(0, 10), (1, 0), (-1, 10), (1, -5)])
def test_sizes_that_read_nothing_are_refused(sizes: tuple[int, int], readers: Readers) -> None:
    with pytest.raises(ValueError, match="one thread and a chunk of one byte at least"):
        readers.make(*sizes)


@pytest.mark.parametrize("piece", [(1, 0, 0, 1, 1, 1), (0, -1, 0, 1, 1, 1), (0, 0, 0, -1, 1, 1), (0, 0, 0, 2, 5, 4)])
def test_pieces_that_are_none_are_refused(
    piece: tuple[int, ...], readers: Readers, files: list[tuple[int, str]]
) -> None:
    with pytest.raises(ValueError, match="a piece must be of one of the files"):
        readers.make(1, 1).read(files[:1], [piece], lambda _: None)


def test_a_reader_needs_buffers(device: Readers) -> None:
    with pytest.raises(ValueError, match="one buffer for each thread"):
        device.make(1, 1, 0)


@pytest.mark.parametrize("buffers", [1, 2, 7])
def test_a_buffer_is_filled_again_only_when_it_is_copied(
    buffers: int, device: Readers, files: list[tuple[int, str]]
) -> None:
    place = torch.empty(65_536, dtype=torch.uint8, device=device.device)
    device.make(2, 1000, buffers).read(files, whole(place, 2), lambda _: None)
    assert bytes(place.cpu().numpy()) == Path(files[2][1]).read_bytes()


def test_the_stream_s_work_comes_first(device: Readers, files: list[tuple[int, str]]) -> None:
    """What was to be done with the place before, as with memory that torch had given to another tensor."""
    place = torch.zeros(65_536, dtype=torch.uint8, device=device.device)
    reader = device.make(2, 1000)
    if device.library is not None:
        device.library.emulator_set_memory(ctypes.c_void_p(place.data_ptr()), 7, ctypes.c_size_t(place.nbytes))
    else:
        torch.cuda._sleep(10**9)
        place.fill_(7)
    reader.read(files, whole(place, 2), lambda _: None)
    if device.library is not None:
        device.library.emulator_synchronize()
    assert bytes(place.cpu().numpy()) == Path(files[2][1]).read_bytes()


@pytest.mark.parametrize(("code", "expected"), [(OUT_OF_MEMORY, MemoryError), (UNKNOWN, RuntimeError)])
def test_whatever_call_fails_nothing_is_left(
    code: int, expected: type[Exception], device: Readers, files: list[tuple[int, str]]
) -> None:
    """Each call of the CUDA runtime in turn."""
    if device.library is None:
        pytest.skip("a GPU's calls do not fail when they are told")
    library = device.library
    place = torch.empty(65_536, dtype=torch.uint8)
    messages: list[str] = []
    for calls in itertools.count():
        library.emulator_fail(calls, code)
        try:
            device.make(2, 9000).read(files, whole(place, 2), lambda _: None)
        except expected as error:
            messages.append(str(error))
        left = library.emulator_fail(-1, 0)
        assert library.emulator_live() == 0
        if left >= 0:  # no call failed
            break
    assert len(messages) > 20
    assert all(re.fullmatch("CUDA, .*: (out of memory|an error that a test wanted)", text) for text in messages)
    assert bytes(place.numpy()) == Path(files[2][1]).read_bytes()
