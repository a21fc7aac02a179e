"""Which files of a folder are a checkpoint, and what is in them; damaged ones are named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import SAFETENSORS, TORCH, write, write_by_rank
from torch import Tensor

from pyllama.checkpoint import INDEX, Checkpoint, find_files
from pyllama.files import CheckpointError


def tensors() -> dict[str, Tensor]:
    """Of several shapes and types, each number its own."""
    numbers = torch.arange(64.0)
    return {
        "embed": numbers[:28].view(7, 4),
        "a.weight": numbers[28:40].view(3, 4).bfloat16(),
        "a.bias": numbers[40:43].half(),
        "scalar": numbers[43],
        "count": torch.tensor([2**40]),
        "mask": torch.tensor([True, False]),
    }


def load(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_type_is_read(shards: int, whole: str, tmp_path: Path) -> None:
    items = list(tensors().items())
    write(tmp_path, *(dict(items[n::shards]) for n in range(shards)), whole=whole)
    assert_same(load(tmp_path), tensors())


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
def test_8_bits_and_their_type(whole: str, tmp_path: Path) -> None:
    """A file of torch.save keeps such a tensor's type apart from its storage's."""
    files = {"a": torch.randn(3, 5).to(torch.float8_e4m3fn), "b": torch.randn(2).to(torch.float8_e5m2)}
    write(tmp_path, files, whole=whole)
    assert_same({k: v.float() for k, v in load(tmp_path).items()}, {k: v.float() for k, v in files.items()})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert {name: info.dtype for name, info in checkpoint.tensors.items()} == {"a": "F8_E4M3", "b": "F8_E5M2"}
        assert checkpoint.dtype == torch.bfloat16


def test_views_parameters_and_shared_storages(tmp_path: Path) -> None:
    """As torch.save writes them: a transposed view, one from the middle, a tied copy, a Parameter, none at all."""
    numbers = torch.arange(24.0).view(4, 6)
    files = {"whole": numbers, "turned": numbers.T, "part": numbers[1:3, 2:5], "tied": numbers, "none": numbers[:0]}
    torch.save(files | {"parameter": torch.nn.Parameter(torch.ones(3))}, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), files | {"parameter": torch.ones(3)})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "größe 2.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "module", "model_state_dict"])
def test_a_training_s_state_beside_the_weights(wrapper: str | None, name: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    content: dict[str, Any] = model.state_dict()  # an OrderedDict with an attribute, the versions of its modules
    if wrapper is None:
        content |= {"step": 3, "loss": 0.5, "name": "run 7", "best": None}
    else:
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        content = {wrapper: content, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": 3}
    torch.save(content, tmp_path / name)
    assert_same(load(tmp_path), dict(model.state_dict()))


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": ONES}, "state_dict": {"a": ONES}}, "under each of model, state_dict, and nothing says which"),
        ({"a": ONES, "rest": {"b": ONES}}, r"it holds rest \(dict\)$"),
        ({"a": ONES, "rest": [ONES]}, r"it holds rest \(list\)$"),
        ({"model": {"a": ONES, "deeper": {"b": ONES}}}, r"it holds deeper \(dict\)$"),
        ({"net": {"a": ONES}}, r"nor has it one under model, state_dict, module, .*: it holds net \(dict\)$"),
        ({"step": 3}, r"it holds step \(int\)$"),
        ({}, "it holds nothing$"),
        ([ONES], "holds list, not a state dict"),
        (ONES, "holds a tensor, not a state dict"),
        ({3: ONES}, "names are not text: 3$"),
        (
            {"a": ONES.to_sparse()},
            r"would import torch.Size, torch._utils._rebuild_sparse_tensor, torch.serialization._get_layout\.",
        ),
        ({"a": ONES.to(torch.complex64)}, r"would import torch.ComplexFloatStorage\. Only what plain tensors need"),
        ({"a": ONES, "path": Path("x"), "set": {1}}, r"would import __builtin__.set, pathlib\.\w+\."),
    ],
)
def test_what_is_no_state_dict_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin .*{message}"):
        load(tmp_path)


def test_formats_that_cannot_be_mapped_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"format of before 1.6, .*torch.save\(torch.load\(file, weights_only=True"
    ):
        load(tmp_path)
    torch.save(torch.load(file, weights_only=True), file)  # what the message says
    assert_same(load(tmp_path), tensors())
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(CheckpointError, match="is a TorchScript archive, a program and not a state dict"):
        load(tmp_path)
    torch.save(tensors(), file, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"is pickled by protocol 4; torch.save's own is 2"):
        load(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 30, 100, 700, -1, -22, -60])
def test_truncated_torch_files_are_named(cut: int, tmp_path: Path) -> None:
    write(tmp_path, tensors(), whole=TORCH)
    file = tmp_path / TORCH
    data = file.read_bytes()[:cut]
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{TORCH} \({len(data):,} bytes\) is not a complete file of torch.save"):
        load(tmp_path)


def damage_header_length(data: bytes) -> bytes:
    return struct.pack("<Q", len(data) * 2) + data[8:]


def damage_huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 62) + data[8:]


def damage_json(data: bytes) -> bytes:
    return data[:8] + b"!" + data[9:]


def damage_offsets(data: bytes) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["embed"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0" * 8,
        damage_header_length,
        damage_huge_header,
        damage_json,
        damage_offsets,
    ],
    ids=["empty", "no length", "cut header", "cut data", "longer", "header > file", "huge header", "json", "offsets"],
)
def test_damaged_files_are_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write(tmp_path, tensors())
    file = tmp_path / "model.safetensors"
    data = damage(file.read_bytes())
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model.safetensors \({len(data):,} bytes\) is not a complete"):
        load(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to nothing$"):
        load(tmp_path)


def sharded(folder: Path) -> None:
    items = list(tensors().items())
    write(folder, dict(items[:3]), dict(items[3:]))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the 2 files that {INDEX} names: model-1.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("embed"), "name different tensors: embed"),
        (lambda m: m.update(ghost="model-0.safetensors"), "name different tensors: ghost"),
        (lambda m: m.update(embed="../model-0.safetensors"), "outside of its folder: ../model-0.safetensors"),
        (lambda m: m.update(embed="/etc/passwd"), "outside of its folder: /etc/passwd"),
        (lambda m: m.update(embed=".."), "outside of its folder: .."),
        (lambda m: m.update(embed="a\0b"), r"outside of its folder: 'a\\x00b'"),
        (lambda m: m.update(embed="\ud800"), r"outside of its folder: '\\ud800'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    change: Callable[[dict[str, str]], object], message: str, tmp_path: Path
) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    change(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": "x"}', "\xff", '{"weight_map":' * 10**5]
)
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    items = list(tensors().items())
    write(tmp_path, dict(items[:3]), dict(items[3:]) | {"embed": tensors()["embed"]})
    with pytest.raises(CheckpointError, match=r"embed is in both model-0.safetensors and model-1.safetensors"):
        load(tmp_path)


def names(folder: Path) -> list[str]:
    return list(find_files(folder).names)


def test_which_files_are_read(tmp_path: Path) -> None:
    """Safetensors before files of torch.save, the whole before shards: the others are the same weights again."""
    with pytest.raises(CheckpointError, match=r"has no file of weights \(\*.safetensors, \*.bin, \*.pth, \*.pt\)$"):
        find_files(tmp_path)
    for name in ("model.Q4.gguf", "params.json", "consolidated.01.pth", "consolidated.00.pth"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["consolidated.00.pth", "consolidated.01.pth"]
    (tmp_path / "pytorch_model.bin").touch()
    assert names(tmp_path) == ["pytorch_model.bin"]
    (tmp_path / "weights.safetensors").touch()
    assert names(tmp_path) == ["weights.safetensors"]
    (tmp_path / "more.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"2 files of weights and no model.safetensors.index.json .*: more.safe"):
        find_files(tmp_path)
    for n in range(11):
        (tmp_path / f"model{n}-mp11.safetensors").touch()
    assert names(tmp_path) == [f"model{n}-mp11.safetensors" for n in range(11)]  # in the order of ranks
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "more.safetensors"}}))
    assert names(tmp_path) == ["more.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "files",
    [
        ["consolidated.00.pth", "consolidated.02.pth"],
        ["consolidated.01.pth"],
        ["consolidated.00.pth", "consolidated.0.pth"],
        ["model0-mp2.safetensors"],
        ["model0-mp2.safetensors", "model1-mp4.safetensors"],
        ["model1-mp2.safetensors", "model2-mp2.safetensors"],
    ],
)
def test_a_missing_rank_is_named(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"has .*{files[0]}.*: not one file for each rank, from 0 to \d"):
        find_files(tmp_path)


def test_pieces_are_of_one_shape_and_in_all_files(tmp_path: Path) -> None:
    write_by_rank(tmp_path, {"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)})
    with pytest.raises(CheckpointError, match=r"pieces of a in model0-mp2.* differ: F32 \[2, 3\] and F32 \[2, 4\]"):
        load(tmp_path)
    write_by_rank(tmp_path, {"a": torch.ones(2, 3)}, {"a": torch.ones(2, 3).half()})
    with pytest.raises(CheckpointError, match=r"differ: F32 \[2, 3\] and F16 \[2, 3\]"):
        load(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    write_by_rank(tmp_path, {"a": torch.ones(1)}, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"neither in one file nor in all 3: a$"):
        load(tmp_path)


def safetensors_file(folder: Path, header: str, data: bytes) -> None:
    text = header.encode()
    (folder / SAFETENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "invalid offset",
        ),
        (
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "a name is there twice",
        ),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', ""),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', ""),
        ('{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}', "expected usize"),
        ('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', "overflow"),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b\\u001b[2J":{"dtype":"F32",'
            '"shape":[0,9223372036854775808],"data_offsets":[4,4]}}',
            r"'b\\x1b\[2J' of impossible sizes",
        ),
        ('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "F99"),
        ("[" * 10**6, ""),
        ('{"a":' * 10**6, ""),
    ],
    ids=str,
)
def test_safetensors_with_impossible_headers_are_named(header: str, message: str, tmp_path: Path) -> None:
    safetensors_file(tmp_path, header, b"1234")
    with pytest.raises(CheckpointError, match=rf"is not a complete safetensors file: .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data_offsets": [4, 28]}, "b is not where its neighbours end"),
        ({"data_offsets": [24, 44]}, "b is not where its neighbours end, or not as large as its shape"),
        ({"shape": [7]}, "b is not where its neighbours end, or not as large as its shape"),
        ({"shape": [-6]}, "b has no place, shape and type of a tensor"),
        ({"dtype": "X32"}, "b has no place, shape and type of a tensor"),
        ({"dtype": "F32", "shape": [6, 2], "data_offsets": [24, 72]}, "its tensors take 72 bytes, but there are 48"),
    ],
)
def test_headers_alone_are_checked(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    entries = {
        "a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [6], "data_offsets": [24, 48]},
    }

    def headers() -> dict[str, tuple[int, ...]]:
        text = json.dumps(entries).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
        with Checkpoint.open(tmp_path, headers_only=True) as checkpoint:
            with pytest.raises(RuntimeError, match="a cannot be read: only headers were opened"):
                checkpoint.read("a")
            return {name: info.shape for name, info in checkpoint.tensors.items()}

    assert headers() == {"a": (6,), "b": (6,)}
    entries["b"] |= change
    with pytest.raises(CheckpointError, match=f"is not a complete safetensors file: ({reason})"):
        headers()
