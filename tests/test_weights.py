"""Tables of rules: every tensor is used once, every parameter is filled, or the names say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shards import SAFETENSORS, TORCH, write, write_by_rank
from torch import Tensor

from pyllama.checkpoint import Checkpoint
from pyllama.files import CheckpointError
from pyllama.transfer import copy_weights
from pyllama.weights import BlockScales, Rule, WeightTable, plan

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


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    table: WeightTable = TABLE,
    parameters: dict[str, torch.Size] = PARAMETERS,
) -> dict[str, Tensor]:
    """The parameters, poisoned before they are filled."""
    filled = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in parameters.items()}
    read: list[int] = []
    with Checkpoint.open(folder) as checkpoint:
        parts = plan(table, parameters, checkpoint.tensors)
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


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_reach_their_place(shards: int, whole: str, tmp_path: Path) -> None:
    files = tensors()
    names = list(files)
    write(tmp_path, *({name: files[name] for name in names[n::shards]} for n in range(shards)), whole=whole)
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


def test_names_with_a_star_are_skipped_whatever_follows(tmp_path: Path) -> None:
    """As layers of multi-token prediction are, beyond those of the model."""
    write(tmp_path, tensors() | {"h.13.experts.0.up": torch.ones(4), "h.13.q": torch.ones(1)})
    table = replace(TABLE, skip=(*TABLE.skip, "h.13.*"))
    assert torch.equal(load(tmp_path, table=table)["embedding"], tensors()["embed"])
    with pytest.raises(CheckpointError, match=r"2 not part of the model: h.13.experts.0.up, h.13.q$"):
        load(tmp_path, table=replace(TABLE, skip=(*TABLE.skip, "h.1.*", "h.13", "*.h.13.*")))


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
def test_reading_makes_no_copy(whole: str, tmp_path: Path) -> None:
    write(tmp_path, tensors(), whole=whole)
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


def pieces(dimensions: dict[str, int | None], ranks: int) -> list[dict[str, Tensor]]:
    """`tensors()` as `ranks` devices hold them: cut along a dimension, whole in one of them (None), or in all."""
    cut: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for n, (name, tensor) in enumerate(tensors().items()):
        if "experts" in name:
            cut[n % ranks][name] = tensor
            continue
        # An index for each row would stay the same if repeated; each of these numbers is its own.
        tensor = torch.cat([tensor + 448 * rank for rank in range(ranks)], dimensions.get(name[-1], 0))
        for rank, piece in enumerate(tensor.chunk(ranks, dimensions.get(name[-1], 0))):
            cut[rank][name] = piece
    return cut


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
@pytest.mark.parametrize("embedding", [0, 1])
def test_pieces_by_rank_are_joined(embedding: int, ranks: int, whole: str, tmp_path: Path) -> None:
    """Along the dimension that makes them the parameter; experts lie whole in one of the files."""
    files = pieces({"d": embedding}, ranks)
    write_by_rank(tmp_path, *files, whole=whole)
    parameters = {
        "embedding": torch.Size((7 * ranks, 4) if embedding == 0 else (7, 4 * ranks)),
        "layers.0.qkv": torch.Size((6 * ranks, 4)),
        "layers.12.qkv": torch.Size((6 * ranks, 4)),
        "layers.12.gate_up": torch.Size((3, 4, 2)),
    }
    found = load(tmp_path, parameters=parameters)
    assert torch.equal(found["embedding"], torch.cat([file["embed"] for file in files], embedding))
    for i in (0, 12):
        joined = [torch.cat([file[f"h.{i}.{part}"] for file in files]) for part in "qkv"]
        assert torch.equal(found[f"layers.{i}.qkv"], torch.cat(joined))
    assert torch.equal(found["layers.12.gate_up"], expected(tensors())["layers.12.gate_up"])


@pytest.mark.parametrize("whole", [SAFETENSORS, TORCH])
def test_what_all_ranks_hold_is_one_copy(whole: str, tmp_path: Path) -> None:
    files = [tensors() for _ in range(3)]
    write_by_rank(tmp_path, *files, whole=whole)
    for name, found in load(tmp_path).items():
        assert torch.equal(found, expected(files[0])[name]), name
    files[2]["h.12.k"][0, 3] += 1
    write_by_rank(tmp_path, *files, whole=whole)
    with pytest.raises(CheckpointError, match=r"h.12.k should be the same in all files, and is not in .*0.* and .*2"):
        load(tmp_path)


def test_pieces_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_by_rank(tmp_path, *pieces({}, 2))
    message = r"wrong shape: embed \[7, 4\] in each of 2 files should be \[7, 4, 1\]"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, parameters={"embedding": torch.Size((7, 4, 1))})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_rows_of_interleaved_heads_are_put_in_order(shape: tuple[int, ...], ranks: int, tmp_path: Path) -> None:
    """Rows 2i and 2i + 1 of a head of 6 become rows i and i + 3, of queries and keys and not of values."""
    files = {name: torch.randn(shape) for name in ("q", "k", "v")}
    write_by_rank(
        tmp_path, *({name: tensor.chunk(ranks)[rank] for name, tensor in files.items()} for rank in range(ranks))
    )
    table = WeightTable((Rule("qkv", ("q", "k", "v"), 0, interleaved=(6, 6, 0)),))
    found = load(tmp_path, table=table, parameters={"qkv": torch.Size((72, *shape[1:]))})["qkv"].split(24)
    order = [6 * head + row for head in range(4) for row in (0, 2, 4, 1, 3, 5)]
    assert torch.equal(found[0], files["q"][order])
    assert torch.equal(found[1], files["k"][order])
    assert torch.equal(found[2], files["v"])


def test_heads_are_not_cut_by_ranks(tmp_path: Path) -> None:
    write_by_rank(tmp_path, {"q": torch.ones(9, 2)}, {"q": torch.ones(9, 2)})
    with pytest.raises(CheckpointError, match=r"q \[9, 2\] should be rows of whole heads"):
        load(tmp_path, table=WeightTable((Rule("q", ("q",), 0, (6,)),)), parameters={"q": torch.Size((18, 2))})


SCALED = WeightTable(
    (Rule("gate_up", ("gate.weight", "up.weight"), 0), Rule("norm", ("norm.weight",), None)), scales=BlockScales(8, 4)
)


def eight_bits(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of 8 bits, a scale for each block of 8 x 4, and what they are: by a loop over elements, in float64."""
    random = torch.Generator().manual_seed(seed)
    stored = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 8), -(-columns // 4), generator=random)
    exact = stored.double()
    for row in range(rows):
        for column in range(columns):
            exact[row, column] *= scales[row // 8, column // 4]
    return stored, scales, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (17, 9), (1, 1), (7, 30), (31, 3)])
def test_8_bit_weights_are_multiplied_by_their_scales(
    rows: int, columns: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In float32, rounded once; tensors of other types beside them are read as they are."""
    stored, scales, exact = eight_bits(rows, columns)
    files = {"gate.weight": stored, "gate.weight_scale_inv": scales}
    files |= {"up.weight": torch.full((2, columns), 0.3, dtype=torch.bfloat16), "norm.weight": torch.ones(3)}
    write(tmp_path, files)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.dtype == (torch.bfloat16 if rows * columns > 3 else torch.float32)
    parameters = {"gate_up": torch.Size((rows + 2, columns)), "norm": torch.Size((3,))}
    found = load(tmp_path, dtype, SCALED, parameters)
    assert torch.equal(found["gate_up"][:rows], exact.float().to(dtype))
    assert torch.equal(found["gate_up"][rows:], files["up.weight"].to(dtype))


def test_blocks_larger_than_any_memory_take_none(tmp_path: Path) -> None:
    stored, scales, _ = eight_bits(7, 3)
    write(tmp_path, {"gate.weight": stored, "gate.weight_scale_inv": scales})
    table = WeightTable((Rule("gate", ("gate.weight",), 0),), scales=BlockScales(2**31 - 1, 2**31 - 1))
    found = load(tmp_path, table=table, parameters={"gate": torch.Size((7, 3))})
    assert torch.equal(found["gate"], stored.float() * scales)


@pytest.mark.parametrize("dimension", [0, 1])
def test_8_bit_pieces_have_scales_of_their_own(dimension: int, tmp_path: Path) -> None:
    """Each rank's blocks begin anew at its piece, and may be cut at its end."""
    parts = [eight_bits(9, 6, seed) for seed in range(3)]
    files = [{"gate.weight": stored, "gate.scale": scales, "norm.weight": torch.ones(3)} for stored, scales, _ in parts]
    write_by_rank(tmp_path, *files)
    table = WeightTable((Rule("gate", ("gate.weight",), 0), SCALED.rules[1]), scales=BlockScales(8, 4, "scale"))
    shape = torch.Size((27, 6) if dimension == 0 else (9, 18))
    found = load(tmp_path, table=table, parameters={"gate": shape, "norm": torch.Size((3,))})
    assert torch.equal(found["gate"], torch.cat([exact for *_, exact in parts], dimension).float())


def test_8_bit_rows_of_interleaved_heads(tmp_path: Path) -> None:
    stored, scales, exact = eight_bits(12, 5)
    write(tmp_path, {"q.weight": stored, "q.weight_scale_inv": scales})
    table = WeightTable((Rule("q", ("q.weight",), 0, (4,)),), scales=BlockScales(8, 4))
    order = [4 * head + row for head in range(3) for row in (0, 2, 1, 3)]
    assert torch.equal(load(tmp_path, table=table, parameters={"q": torch.Size((12, 5))})["q"], exact[order].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gate.weight_scale_inv"), "1 missing: gate.weight_scale_inv$"),
        (
            lambda t: t.update({"gate.weight_scale_inv": torch.ones(3, 2)}),
            r"gate.weight_scale_inv \[3, 2\] in model.safetensors should be \[2, 2\], one for each 8 x 4 of gate",
        ),
        (lambda t: t.update({"gate.weight_scale_inv": torch.ones(2, 2).int()}), r"gate.weight_scale_inv \(I32\)"),
        (lambda t: t.update({"up.weight_scale_inv": torch.ones(1)}), "1 not part of the model: up.weight_scale_inv$"),
        (lambda t: t.update({"norm.weight": torch.ones(3).to(torch.float8_e4m3fn)}), "missing: norm.weight_scale_inv$"),
    ],
)
def test_scales_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    stored, scales, _ = eight_bits(9, 5)
    files = {"gate.weight": stored, "gate.weight_scale_inv": scales}
    files |= {"up.weight": torch.ones(2, 5), "norm.weight": torch.ones(3)}
    change(files)
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, table=SCALED, parameters={"gate_up": torch.Size((11, 5)), "norm": torch.Size((3,))})
