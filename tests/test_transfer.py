"""How weights come into memory: mapped where they are a tensor of a file, read where they are stacked."""

from __future__ import annotations

import copy
import io
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shards import SAFETENSORS, TORCH, write, write_by_rank
from torch import Tensor

import pyllama
from pyllama.checkpoint import Checkpoint
from pyllama.files import CheckpointError
from pyllama.model import Model
from pyllama.transfer import (
    STAGED_BYTES,
    _batches,
    _make_from_views,
    _make_on_device,
    _reader,
    _tasks,
    copy_weights,
    mapped_weights,
)
from pyllama.weights import BlockScales, Rule, WeightTable, plan

TABLE = WeightTable((Rule("whole", ("a",), 0), Rule("stacked", ("b", "c"), 0)))
CPU = torch.device("cpu")


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(8, 16).to(dtype) for name in "abc"}


def shift(file: Path, start: int) -> None:
    """Moves the file's tensors to bytes that are `start` above a multiple of 64."""
    data = file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    text = data[8:header].rstrip()
    text += b" " * ((start - 8 - len(text)) % 64)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[header:])


def mapped(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"whole": torch.Size((8, 16)), "stacked": torch.Size((16, 16))}
    with Checkpoint.open(folder) as checkpoint:
        return mapped_weights(plan(TABLE, shapes, checkpoint.tensors), dict.fromkeys(shapes, dtype), checkpoint)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path, tensors())
    shift(tmp_path / SAFETENSORS, 16)
    return tmp_path / SAFETENSORS


def test_what_is_written_to_a_mapped_weight_stays_in_memory(file: Path) -> None:
    """As an optimizer writes; and every load begins with what the file holds."""
    before, stored = file.read_bytes(), load_file(file)["a"]
    weight = mapped(file.parent)["whole"]
    assert torch.equal(weight, stored)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.sum().backward()
    optimizer.step()
    assert torch.equal(parameter, stored - 1)
    assert torch.equal(weight, stored - 1)
    assert file.read_bytes() == before
    assert torch.equal(mapped(file.parent)["whole"], stored)


def test_a_mapped_weight_outlives_its_file(file: Path) -> None:
    """Which another may replace, as downloads and `pyllama convert` do."""
    stored = load_file(file)["a"]
    weight = mapped(file.parent)["whole"]
    (file.parent / "new").write_bytes(bytes(file.stat().st_size))
    os.replace(file.parent / "new", file)
    assert torch.equal(weight, stored)
    file.unlink()
    assert torch.equal(weight, stored)


def test_a_mapped_weight_is_a_tensor_of_its_own(file: Path) -> None:
    """Copied, saved and shared without the rest of its file."""
    weight = mapped(file.parent)["whole"]
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert weight.storage_offset() == 0
    other = copy.deepcopy(torch.nn.Parameter(weight))
    with torch.no_grad():
        other.zero_()
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    assert buffer.tell() < weight.nbytes + 4096
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue())), weight)
    assert torch.equal(weight, load_file(file)["a"])


def test_a_child_s_writes_are_its_own(file: Path) -> None:
    weight = mapped(file.parent)["whole"]
    before = weight.clone()
    child = os.fork()
    if child == 0:
        weight.numpy()[:] = 0
        os._exit(int(weight.numpy().any()))
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("start", "found"), [(0, True), (8, True), (56, True), (4, False), (2, False), (1, False)])
def test_mapped_weights_are_aligned(start: int, found: bool, file: Path) -> None:
    """To 8 bytes, as files have it that safetensors writes; from others they are copied."""
    shift(file, start)
    assert ("whole" in mapped(file.parent)) == found
    stored = load_file(file)
    filled = {"whole": torch.empty(8, 16), "stacked": torch.empty(16, 16)}
    with Checkpoint.open(file.parent) as checkpoint:
        parts = plan(TABLE, {name: weight.shape for name, weight in filled.items()}, checkpoint.tensors)
        copy_weights(parts, filled, checkpoint, lambda _: None)
    assert torch.equal(filled["whole"], stored["a"])
    assert torch.equal(filled["stacked"], torch.cat([stored["b"], stored["c"]]))


def test_what_is_not_the_parameter_as_it_is_is_not_mapped(tmp_path: Path) -> None:
    for name in ("other type", "torch.save", "by rank"):
        (tmp_path / name).mkdir()
    write(tmp_path / "other type", tensors(torch.bfloat16))
    tied = dict.fromkeys("abc", torch.randn(8, 16))  # of one storage
    write(tmp_path / "torch.save", tied, whole=TORCH)
    write_by_rank(tmp_path / "by rank", *[tensors()] * 2)
    with Checkpoint.open(tmp_path / "by rank") as checkpoint:
        parts = plan(WeightTable(TABLE.rules[:1], skip=("b", "c")), {"whole": torch.Size((8, 16))}, checkpoint.tensors)
        assert not mapped_weights(parts, {"whole": torch.float32}, checkpoint)
    assert not mapped(tmp_path / "other type")
    assert not mapped(tmp_path / "torch.save")
    order = WeightTable((Rule("whole", ("a",), 0, interleaved=(4,)),), skip=("b", "c"))
    write(tmp_path, tensors())
    shift(tmp_path / SAFETENSORS, 0)
    with Checkpoint.open(tmp_path) as checkpoint:
        parts = plan(order, {"whole": torch.Size((8, 16))}, checkpoint.tensors)
        assert not mapped_weights(parts, {"whole": torch.float32}, checkpoint)


@pytest.mark.parametrize("shape", ["whole", "stacked"])
def test_a_file_cut_while_it_is_read_is_named(shape: str, file: Path) -> None:
    """After its header was held against its size."""
    parameters = {"whole": torch.empty(8, 16), "stacked": torch.empty(16, 16)}
    with Checkpoint.open(file.parent) as checkpoint:
        parts = plan(TABLE, {name: weight.shape for name, weight in parameters.items()}, checkpoint.tensors)
        start = checkpoint.source("a").offsets["a" if shape == "whole" else "c"]
        os.truncate(file, start + 100)
        with pytest.raises(
            CheckpointError, match=rf"{SAFETENSORS} .* is not a complete .* it was cut while it was read"
        ):
            copy_weights({shape: parts[shape]}, parameters, checkpoint, lambda _: None)


def test_what_progress_raises_is_not_the_file_s(file: Path) -> None:
    def closed(_: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    weight = torch.empty(8, 16)
    with Checkpoint.open(file.parent) as checkpoint:
        parts = plan(TABLE, {"whole": weight.shape, "stacked": torch.Size((16, 16))}, checkpoint.tensors)
        with pytest.raises(BrokenPipeError):
            copy_weights({"whole": parts["whole"]}, {"whole": weight}, checkpoint, closed)


def staged_files() -> tuple[list[dict[str, Tensor]], WeightTable, dict[str, torch.Size]]:
    """Whatever is made rather than read: other types, rows in another order, 8 bits with scales, in two pieces."""
    files = []
    for _ in range(2):
        stored = torch.randn(17, 9).to(torch.float8_e4m3fn)
        files.append(
            {
                "q": torch.randn(12, 5),
                "w.weight": stored,
                "w.weight_scale_inv": torch.rand(3, 3),
                "half": torch.randn(3, 7).half(),
                "odd": torch.randn(1, 1).bfloat16(),
            }
        )
    rules = (
        Rule("q", ("q",), 0, (6,)),
        Rule("w", ("w.weight",), 0),
        Rule("half", ("half",), 0),
        Rule("odd", ("odd",), 0),
    )
    shapes = {
        "q": torch.Size((24, 5)),
        "w": torch.Size((17, 18)),
        "half": torch.Size((3, 14)),
        "odd": torch.Size((2, 1)),
    }
    return files, WeightTable(rules, scales=BlockScales(8, 4)), shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("staged_bytes", [1, 1024, STAGED_BYTES])
def test_weights_made_from_staged_bytes(staged_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """As on a GPU, here in the CPU's memory; the same as from views of the file."""
    files, table, shapes = staged_files()
    write_by_rank(tmp_path, *files)
    made: list[dict[str, Tensor]] = []
    reader = _reader(CPU)
    assert reader is not None
    with Checkpoint.open(tmp_path) as checkpoint:
        parts = plan(table, shapes, checkpoint.tensors)
        for staged in (False, True):
            filled = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}
            tasks = _tasks(parts, filled)
            read: list[int] = []
            if staged:
                batches = list(_batches(tasks, checkpoint, staged_bytes))
                assert len(batches) == {1: 4, 1024: 3, STAGED_BYTES: 1}[staged_bytes]
                _make_on_device(batches, reader, checkpoint, read.append)
            else:
                _make_from_views(tasks, checkpoint, 2, read.append)
            assert sum(read) == sum(info.bytes for name, info in checkpoint.tensors.items() if "scale" not in name)
            made.append(filled)
    for name, weight in made[0].items():
        assert torch.equal(made[1][name], weight), name
        assert not weight.isnan().any()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
def test_weights_reach_a_gpu(whole: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Read, staged or copied: the same as on the CPU."""
    files, table, shapes = staged_files()
    write_by_rank(tmp_path, *files, whole=whole)
    found = {}
    with Checkpoint.open(tmp_path) as checkpoint:
        parts = plan(table, shapes, checkpoint.tensors)
        for device in ("cpu", "cuda"):
            found[device] = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
            copy_weights(parts, found[device], checkpoint, lambda _: None)
    for name, weight in found["cpu"].items():
        assert torch.equal(found["cuda"][name].cpu(), weight), name


def storages(model: Model) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_a_model_of_mapped_weights_is_trained_like_any(folder: Path, tmp_path: Path) -> None:
    """The same steps as from copies; no two of its parameters share memory; the checkpoint is as it was."""
    token_ids = torch.arange(40)[None]
    trained = []
    for start in (8, 4):  # mapped, and copied
        other = tmp_path / str(start)
        other.mkdir()
        for name in ("config.json", SAFETENSORS):
            (other / name).write_bytes((folder / name).read_bytes())
        shift(other / SAFETENSORS, start)
        before = (other / SAFETENSORS).read_bytes()
        model = pyllama.load(other, device="cpu", dtype="float32")
        assert len(storages(model)) == len(list(model.parameters()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            model(token_ids).square().mean().backward()
            optimizer.step()
        trained.append(model.state_dict())
        assert (other / SAFETENSORS).read_bytes() == before
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name
