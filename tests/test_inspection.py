"""`pyllama inspect` against what is in the files, formulas worked out by hand, and loaded models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from shards import save, write, write_by_rank, write_headers
from tiny import byte_level_tokenizer, write_checkpoint
from torch import Tensor, nn
from typer.testing import CliRunner

import pyllama
from pyllama.bench.work import Cell, step_work
from pyllama.cache import PAGE_SIZE, PagedCache
from pyllama.cli import app
from pyllama.files import CheckpointError
from pyllama.inspection import inspect
from pyllama.inspection.report import lines
from pyllama.inspection.tree import Node


def flat(node: Node, prefix: str = "") -> dict[str, Node]:
    """All nodes by their whole names."""
    found = {}
    for child in node.children:
        name = f"{prefix}{child.name}"
        found |= {name: child} | flat(child, f"{name}.")
    return found


def test_a_model_by_hand(tmp_path: Path) -> None:
    """6 layers of width 512 with a vocabulary of 168,283 and a feed-forward size of 2,048, head and embedding apart."""
    V, D, F, layers = 168_283, 512, 2_048, 6
    tensors = {"embedding.weight": ("F32", (V, D)), "norm.weight": ("F32", (D,)), "head.weight": ("F32", (V, D))}
    for i in range(layers):
        tensors |= {f"layers.{i}.attention.{name}.weight": ("F32", (D, D)) for name in ("q", "k", "v", "out")}
        tensors |= {f"layers.{i}.up.weight": ("F32", (F, D)), f"layers.{i}.down.weight": ("F32", (D, F))}
    write_headers(tmp_path / "model.safetensors", tensors)
    found = inspect(tmp_path / "model.safetensors")
    assert found.root.parameters == 191_196_672 == V * D + D + (4 * D * D + 2 * D * F) * layers + V * D
    assert found.root.bytes == 4 * 191_196_672
    assert (found.files, found.tensors, found.dtypes) == (1, 39, {"F32": 4 * 191_196_672})
    nodes = flat(found.root)
    assert nodes["layers.0-5"].count == 6
    assert nodes["layers.0-5"].parameters == (4 * D * D + 2 * D * F) * layers
    assert nodes["layers.0-5.attention"].parameters == 4 * D * D * layers
    down = nodes["layers.0-5.down.weight"]
    assert (down.count, down.parameters, down.shape, down.dtype) == (6, 6 * D * F, (D, F), "F32")
    assert found.model is None
    assert found.problem is not None
    assert "no config.json" in found.problem


@pytest.mark.parametrize("suffix", ["bin", "pth", "pt", "safetensors"])
def test_a_plain_module_of_torch(suffix: str, tmp_path: Path) -> None:
    """Such a state dict has more than the formula above: attention to a memory, biases, three norms a layer."""
    D, F, V, layers = 64, 128, 100, 3
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, F), layers)
    model = nn.ModuleDict({"embedding": nn.Embedding(V, D), "decoder": decoder})
    file = tmp_path / f"model.{suffix}"
    save(model.state_dict(), file)
    found = inspect(str(file))
    attention, ffn, norms = 4 * D * D + 4 * D, 2 * D * F + D + F, 3 * 2 * D
    assert found.root.parameters == V * D + layers * (2 * attention + ffn + norms)
    assert found.root.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert flat(found.root)["decoder.layers.0-2.self_attn"].parameters == layers * attention


def test_structures_that_differ_stay_apart(tmp_path: Path) -> None:
    """Dense layers before layers with experts; a layer and an expert that are missing; one of another type."""
    tensors = {}
    for i in (0, 1, 2, 3, 4, 10):
        names = ["mlp"] if i < 2 else [f"experts.{e}" for e in range(8) if (i, e) != (4, 5)]
        tensors |= {f"layers.{i}.{name}.{part}": ("BF16", (4, 6)) for name in names for part in ("up", "down")}
        tensors[f"layers.{i}.norm"] = ("BF16", (6,))
    tensors["layers.3.norm"] = ("F32", (6,))
    tensors |= {"scales.0": ("F32", ()), "scales.1": ("F32", ()), "packed": ("U8", (5,))}
    tensors |= {"norm": ("F32", (3,)), "norm.weight": ("F32", (3,))}  # a tensor, and one within it
    write_headers(tmp_path / "odd.safetensors", tensors)
    nodes = flat(inspect(tmp_path / "odd.safetensors").root)
    assert {name for name in nodes if name.startswith("layers.") and name.count(".") == 1} == {
        "layers.0-1", "layers.2,10", "layers.3", "layers.4",
    }  # fmt: skip
    experts = nodes["layers.2,10.experts.0-7"]
    assert (experts.count, experts.parameters, experts.bytes) == (16, 16 * 48, 16 * 96)
    assert nodes["layers.4.experts.0-4,6-7"].count == 7
    assert (nodes["scales.0-1"].count, nodes["scales.0-1"].shape) == (2, ())
    assert (nodes["packed"].parameters, nodes["packed"].bytes) == (0, 5)  # codes are no parameters
    assert nodes["norm"].parameters == 6
    assert nodes["norm.weight"].shape == nodes["norm.norm"].shape == (3,)


def test_a_layer_in_two_files_is_as_the_others(tmp_path: Path) -> None:
    """Whatever the order in which its parts are met."""
    parts = ("attention.q", "attention.k", "mlp.up", "mlp.down")
    tensors = {f"layers.{i}.{part}": torch.zeros(2, 3) for i in range(3) for part in parts}
    first = {name: tensors[name] for name in ("layers.1.mlp.up", "layers.0.mlp.down", "layers.2.attention.k")}
    write(tmp_path, first, {name: tensor for name, tensor in tensors.items() if name not in first})
    assert [node.name for node in inspect(tmp_path).root.children] == ["layers.0-2"]


def test_names_and_texts_from_anybody(tmp_path: Path) -> None:
    names = {"a" + ".b" * 100_000: 2, "\x1b[31mred.weight": 2, "": 1, ".": 1, "9" * 5_000: 3, "01": 1, "\u0663": 1}
    write_headers(tmp_path / "x.safetensors", {name: ("F32", (size,)) for name, size in names.items()})
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["\x1b[31m\n"]}))
    found = inspect(tmp_path)
    assert found.root.parameters == 11
    shown = "\n".join(lines(found))
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 1000


@pytest.mark.parametrize("shape", [(2**62,) * 40 + (0,), (0,) * 1000, (2**62, 4, 0)], ids=len)
def test_impossible_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    if len(shape) > 64:
        with pytest.raises(CheckpointError, match="a has no place, shape and type of a tensor"):
            inspect(tmp_path)
    else:
        assert all(len(line) < 300 for line in lines(inspect(tmp_path)))


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save({}, tmp_path / "x.safetensors")
    found = inspect(tmp_path)
    assert (found.tensors, found.root.bytes) == (0, 0)
    assert list(lines(found))[-1].startswith("all")


@pytest.mark.parametrize("by_rank", [False, True])
def test_several_files(by_rank: bool, tmp_path: Path) -> None:
    if by_rank:
        write_by_rank(tmp_path, *[{"a.weight": torch.zeros(4, 3)}] * 3)
    else:
        write(tmp_path, {"a.weight": torch.zeros(4, 3)}, {"b.weight": torch.zeros(24)})
    found = inspect(tmp_path)
    assert (found.files, found.tensors) == ((3, 1) if by_rank else (2, 2))
    assert (found.root.parameters, found.root.bytes) == (36, 144)


def test_files_larger_than_memory(tmp_path: Path) -> None:
    """720 GB of experts in two files that hold nothing else than headers: they could not even be mapped."""
    D, F, layers, files = 7168, 2048, 48, {}
    for half in (0, 1):
        names = [f"model.layers.{i}.mlp.experts.{e}" for i in range(half, layers, 2) for e in range(256)]
        tensors = {f"{name}.up_proj.weight": ("BF16", (2 * F, D)) for name in names}
        write_headers(tmp_path / f"model-{half}.safetensors", tensors)
        files |= dict.fromkeys(tensors, f"model-{half}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = inspect(tmp_path)
    assert found.root.bytes == layers * 256 * 2 * 2 * F * D > 700e9
    (experts,) = found.root.children
    assert (experts.name, experts.count) == ("model.layers.0-47.mlp.experts.0-255.up_proj.weight", 48 * 256)


def check_facts(folder: Path) -> None:
    """Of a model that pyllama runs, against the loaded model."""
    found, model = inspect(folder), pyllama.load(folder, "cpu", "float32")
    facts = found.model
    assert facts is not None, found.problem
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.tied == (model.head is None)
    assert facts.embedding_parameters == model.embedding.weight.numel()
    assert facts.layers == len(model.layers)
    cache = PagedCache(model.config, 1, "cpu", {"F32": torch.float32, "BF16": torch.bfloat16}[facts.dtype])
    assert facts.cache_bytes_per_token * PAGE_SIZE == sum(layer.nbytes for layer in cache.layers)
    flops = step_work(model, Cell(batch=1, context=4, new_tokens=2)).flops
    assert facts.flops_per_token + 5 * facts.flops_per_token_seen == flops
    assert facts.active_parameters <= facts.parameters


@pytest.mark.parametrize("tied", [False, True])
def test_facts_of_a_model(tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer(), tie_word_embeddings=tied)
    check_facts(tmp_path)


def test_facts_of_the_embedded_model() -> None:
    """By hand: 4 layers of 192 with 3 heads of 64 and one for keys, 2 of 8 experts of 64 and a shared one, tied."""
    found = inspect("demo")
    assert found.model is not None
    D, V, F, layers = 192, 1536, 64, 4
    attention, router, expert, norms = 2 * D * D + 2 * 64 * D, 8 * D, 3 * D * F, 2 * D
    assert found.model.parameters == V * D + D + layers * (attention + router + norms + 9 * expert)
    assert found.model.active_parameters == found.model.parameters - layers * 6 * expert
    assert found.model.cache_bytes_per_token == layers * 2 * 64 * 2
    assert found.model.flops_per_token == 2 * (V * D + layers * (attention + router + 3 * expert))
    assert found.model.flops_per_token_seen == layers * 4 * 3 * 64


def test_why_there_are_no_facts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    for change, problem in (
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\] is not known"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"intermediate_size": 40}, "the checkpoint's tensors are not those of its config.json"),
        ({"num_hidden_layers": 1000}, "1000 layers and in them 0 experts, but the files hold only 21 tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        found = inspect(tmp_path)
        assert found.model is None
        assert re.search(problem, str(found.problem))
        assert found.root.parameters > 0


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        inspect(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"notes.txt is no file of weights: its name must be one of \*.safetensors"
    ):
        inspect(tmp_path / "notes.txt")
    write_headers(tmp_path / "cut.safetensors", {"a": ("F32", (100,))})
    with (tmp_path / "cut.safetensors").open("r+b") as opened:
        opened.truncate(100)
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        inspect(tmp_path / "cut.safetensors")


def test_the_command(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {f"layers.{i}.weight": torch.zeros(300, 20) for i in range(3)}
    save(tensors | {"bias": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.safetensors")])
    assert result.exit_code == 0, result.output
    first, *_, head, bias, layers, whole = (re.split(r"\s{2,}", line) for line in result.stdout.splitlines())
    assert first == ["source", str(tmp_path / "model.safetensors")]
    assert head == ["module", "number", "shape", "type", "parameters", "bytes", "share"]
    assert layers == ["└─ layers.0-2.weight", "3", "300 x 20", "F32", "18,000", "72 kB", "100.0%"]
    assert bias == ["├─ bias", "2", "F16", "2", "4 B", "0.0%"]
    assert whole == ["all", "18,002", "72 kB", "100.0%"]
    result = CliRunner().invoke(app, ["inspect", "demo", "--json"])
    found = json.loads(result.stdout)
    assert found["model"]["parameters"] == found["root"]["parameters"] == 2_023_104
    assert found["root"]["children"][0]["name"] == "model"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no folder")
