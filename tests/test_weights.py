"""Tables of rules: every tensor is used once, every parameter is filled, or the names say what is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyllama.checkpoint import INDEX, Checkpoint, find_files
from pyllama.files import CheckpointError
from pyllama.weights import Rule, WeightTable, copy_weights, plan

TABLE = WeightTable(
    (
        Rule("embedding", ("embed",), 0),
        Rule("layers.{i}.qkv", ("h.{i}.q", "h.{i}.k", "h.{i}.v"), 0),
        Rule("layers.{i}.gate_up", ("h.{i}.experts.{e}.gate", "h.{i}.experts.{e}.up"), 1),
        Rule("head", ("lm_head",), 0),
    ),
    skip=("h.{i}.inv_freq", "lm_head"),
)
PARAMETERS = {
    "embedding": torch.Size((7, 4)),
    "layers.0.qkv": torch.Size((6, 4)),
    "layers.12.qkv": torch.Size((6, 4)),
    "layers.12.gate_up": torch.Size((3, 4, 2)),  # 3 experts
}


def tensors() -> dict[str, Tensor]:
    """What fills PARAMETERS, each number its own."""
    shapes = {"embed": (7, 4)}
    for i in (0, 12):
        shapes |= {f"h.{i}.q": (2, 4), f"h.{i}.k": (1, 4), f"h.{i}.v": (3, 4)}
    for e in range(3):
        shapes |= {f"h.12.experts.{e}.gate": (1, 2), f"h.12.experts.{e}.up": (3, 2)}
    numbers = torch.randperm(448, generator=torch.Generator().manual_seed(0)).float().view(14, 32)
    return {name: numbers[n, : a * b].reshape(a, b).clone() for n, (name, (a, b)) in enumerate(shapes.items())}


def write(folder: Path, *files: dict[str, Tensor]) -> None:
    """One file, or shards with their index."""
    if len(files) == 1:
        save_file({k: v.contiguous() for k, v in files[0].items()}, folder / "model.safetensors")
        return
    weight_map = {}
    for n, file in enumerate(files):
        name = f"model-{n}.safetensors"
        save_file({k: v.contiguous() for k, v in file.items()}, folder / name)
        weight_map |= dict.fromkeys(file, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parameters, poisoned before they are filled."""
    filled = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in PARAMETERS.items()}
    read = []
    with Checkpoint.open(folder) as checkpoint:
        parts = plan(TABLE, PARAMETERS, checkpoint.tensors)
        copy_weights(parts, filled, checkpoint, read.append)
        used = {part.tensor for found in parts.values() for part in found}
        assert sum(read) == sum(checkpoint.tensors[name].bytes for name in used)
    return filled


def expected(files: dict[str, Tensor]) -> dict[str, Tensor]:
    def stack(i: int) -> Tensor:
        return torch.cat([files[f"h.{i}.{part}"] for part in "qkv"])

    experts = [torch.cat([files[f"h.12.experts.{e}.{part}"] for part in ("gate", "up")]) for e in range(3)]
    return {
        "embedding": files["embed"],
        "layers.0.qkv": stack(0),
        "layers.12.qkv": stack(12),
        "layers.12.gate_up": torch.stack(experts),
    }


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_reach_their_place(shards: int, tmp_path: Path) -> None:
    files = tensors()
    names = list(files)
    write(tmp_path, *({name: files[name] for name in names[n::shards]} for n in range(shards)))
    for name, found in load(tmp_path).items():
        assert torch.equal(found, expected(files)[name]), name


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_types_are_converted_once(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    files = {name: (tensor / 7).to(stored) for name, tensor in tensors().items()}
    write(tmp_path, files)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.dtype == stored
    for name, found in load(tmp_path, wanted).items():
        assert torch.equal(found, expected(files)[name].to(wanted)), name


def test_the_checkpoints_type_is_that_of_most_bytes(tmp_path: Path) -> None:
    files = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    write(tmp_path, files | {"h.0.inv_freq": torch.ones(2), "h.12.q": tensors()["h.12.q"]})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.dtype == torch.bfloat16


def test_leftovers_that_the_table_names_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, tensors() | {"h.0.inv_freq": torch.ones(4), "lm_head": torch.ones(7, 4)})
    assert torch.equal(load(tmp_path)["embedding"], tensors()["embed"])


def test_reading_makes_no_copy(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    with Checkpoint.open(tmp_path) as checkpoint:
        first, again = checkpoint.read("embed"), checkpoint.read("embed")
        assert first.data_ptr() == again.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embed"), "1 missing: embed$"),
        (lambda t: t.pop("h.12.k"), "1 missing: h.12.k$"),
        (lambda t: t.pop("h.12.experts.2.up"), r"1 missing: h.12.experts.2.up$"),
        (lambda t: [t.pop(k) for k in list(t) if "12" in k], r"9 missing: h.12.experts.0.gate, .* and 5 more$"),
        (lambda t: t.update(odd=torch.ones(2), even=torch.ones(2)), "2 not part of the model: even, odd$"),
        (lambda t: t.update(wte=t.pop("embed")), "1 missing: embed; 1 not part of the model: wte$"),
        (lambda t: t.update({"h.12.experts.3.up": torch.ones(3, 2)}), "not part of the model: h.12.experts.3.up"),
        (lambda t: t.update(h_0_inv_freq=torch.ones(1)), "1 not part of the model: h_0_inv_freq$"),
        (lambda t: t.update(embed=torch.ones(7, 5)), r"wrong shape: embed \[7, 5\] should be \[7, 4\]"),
        (lambda t: t.update(embed=torch.ones(28)), r"embed \[28\] should be \[7, 4\]"),
        (lambda t: t.update(embed=torch.tensor(1.0)), r"embed \[\] should be \[7, 4\]"),
        (
            lambda t: t.update({"h.0.v": torch.ones(2, 4)}),
            r"h.0.q \[2, 4\], h.0.k \[1, 4\], h.0.v \[2, 4\] should stack to \[6, 4\]",
        ),
        (
            lambda t: t.update({"h.12.experts.1.up": torch.ones(3, 3)}),
            r"experts.1.up \[3, 3\] should stack to \[4, 2\]",
        ),
        (lambda t: t.update(embed=torch.ones(7, 4).to(torch.float8_e5m2)), r"not F64, .*: embed \(F8_E5M2\)"),
        (lambda t: t.update(embed=torch.ones(7, 4).to(torch.float8_e4m3fn)), "1 F8_E4M3 without scales, .*: embed$"),
        (lambda t: t.update(embed=torch.ones(7, 4).to(torch.int8)), r"not F64, .*: embed \(I8\)"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    files = tensors()
    change(files)
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_parameter_without_a_rule_is_named(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="a rule for the parameter bias"):
        plan(TABLE, PARAMETERS | {"bias": torch.Size((4,))}, checkpoint.tensors)


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
    with pytest.raises(CheckpointError, match=r"model.safetensors \(a link to nothing\) is not a complete"):
        load(tmp_path)


def sharded(folder: Path) -> None:
    names = list(tensors())
    write(folder, {name: tensors()[name] for name in names[:5]}, {name: tensors()[name] for name in names[5:]})


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


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": "x"}', "\xff"])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    names = list(tensors())
    write(
        tmp_path,
        {name: tensors()[name] for name in names[:5]},
        {name: tensors()[name] for name in ["embed", *names[5:]]},
    )
    with pytest.raises(CheckpointError, match=r"embed is in both model-0.safetensors and model-1.safetensors"):
        load(tmp_path)


def test_which_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no .safetensors file$"):
        find_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin. Only safetensors are read.*save_pretrained"):
        find_files(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert find_files(tmp_path) == (["weights.safetensors"], None)
    (tmp_path / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model.safetensors.index.json"):
        find_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_files(tmp_path) == (["model.safetensors"], None)  # the others are copies in other layouts
