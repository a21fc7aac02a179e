"""Conversion of every family and every format: the result is the same model bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import Decoder
from deepseek_decoder import DeepseekDecoder
from families import OPTIONS, draw, write, write_llama_moe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_deepseek import FAMILIES as DEEPSEEK
from test_deepseek import draw as draw_deepseek
from test_meta import PARAMS, TWIN, meta_tensors, tokens, write_meta
from test_minimind import write_research
from tiny import byte_level_tokenizer, write_checkpoint, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import pyllama
from pyllama.checkpoint import INDEX
from pyllama.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig
from pyllama.convert import convert
from pyllama.save import unstack
from pyllama.weights import Rule, WeightTable

EIGHT_BITS = {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e4m3", "activation_scheme": "dynamic"}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def write_bin(folder: Path, family: str) -> None:
    """As checkpoints were before safetensors: shards of torch.save with an index."""
    write(folder, draw(family, 1) | {"num_hidden_layers": 2}, shard_size="60KB")
    index = json.loads((folder / INDEX).read_text())
    for name in set(index["weight_map"].values()):
        torch.save(
            load_file(folder / name), folder / name.replace("model", "pytorch_model").replace("safetensors", "bin")
        )
        (folder / name).unlink()
    files = {
        tensor: name.replace("model", "pytorch_model").replace("safetensors", "bin")
        for tensor, name in index["weight_map"].items()
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index | {"weight_map": files}))
    (folder / INDEX).unlink()


def write_own(folder: Path, shards: int = 1) -> None:
    reference = write(folder.with_name("twin"), TWIN)
    write_meta(folder, PARAMS | {"vocab_size": -1}, meta_tensors(reference), shards, 1)


SOURCES: dict[str, Callable[[Path], Any]] = {
    **{family: lambda folder, family=family: write(folder, draw(family, 1), shard_size="60KB") for family in OPTIONS},
    **{family: lambda folder, family=family: write(folder, draw_deepseek(family, 1)) for family in DEEPSEEK},
    "llama_moe": write_llama_moe,
    "llama_moe without shared": lambda folder: write_research(folder, n_shared_experts=None),
    "llama.bin": lambda folder: write_bin(folder, "llama"),
    "mixtral.bin": lambda folder: write_bin(folder, "mixtral"),
    "meta": write_own,
    "meta in 2 shards": lambda folder: write_own(folder, 2),
    "research": write_research,
    "dense research": lambda folder: write_research(folder, use_moe=False),
}
TRANSFORMERS_HAS_NOT = {"llama_moe", "llama_moe without shared", "research"}


@pytest.mark.parametrize("kind", SOURCES)
@torch.no_grad()
def test_the_result_is_the_same_model(kind: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "new" / "result"
    SOURCES[kind](source)
    convert(source, folder, max_shard_size="40KB")
    expected, found = (pyllama.load(path, device="cpu") for path in (source, folder))
    assert found.config.layers == expected.config.layers
    assert found.config.max_positions == expected.config.max_positions
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    token_ids = tokens(40)
    logits = found(token_ids[None])[0]
    assert torch.equal(logits, expected(token_ids[None])[0])

    exact = (DeepseekDecoder if kind in DEEPSEEK else Decoder)(folder)(token_ids)
    assert (logits.double() - exact).abs().max() < 2e-5 * exact.std()
    if kind not in TRANSFORMERS_HAS_NOT:
        reference, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert reference.dtype == torch.float32
        theirs = reference.eval()(token_ids[None]).logits[0]
        torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-5 * exact.std().item())

    again = tmp_path / "again"
    convert(folder, again, max_shard_size=10**9)
    assert [file.name for file in again.glob("*.safetensors")] == ["model.safetensors"]
    assert same(tensors(folder), tensors(again))

    saved = tmp_path / "saved"
    expected.save(saved, max_shard_size="40KB")
    assert same(tensors(folder), tensors(saved))
    assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_another_data_type(dtype: Any, tmp_path: Path) -> None:
    write(tmp_path / "source", draw("mixtral", 2))
    convert(tmp_path / "source", tmp_path / "result", dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {tensor.dtype for tensor in tensors(tmp_path / "result").values()} == {wanted}
    expected, found = (pyllama.load(tmp_path / name, device="cpu", dtype=dtype) for name in ("source", "result"))
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "result").dtype == wanted


def test_each_tensor_keeps_its_type(tmp_path: Path) -> None:
    """Norms of float32 among weights of bfloat16, and three types that stand in one parameter."""
    source = tmp_path / "source"
    write(source, draw("llama", 4) | {"vocab_size": 211, "num_hidden_layers": 1, "attention_bias": False})
    given = tensors(source)
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in given.items()}
    mixed["model.layers.0.self_attn.v_proj.weight"] = given["model.layers.0.self_attn.v_proj.weight"].half()
    save_file(mixed, source / "model.safetensors")
    convert(source, tmp_path / "result", max_shard_size="1KB")
    found = tensors(tmp_path / "result")
    assert found.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert found[name].dtype == (
            torch.float32 if "norm" in name or (".self_attn." in name and "o_proj" not in name) else torch.bfloat16
        )
        assert torch.equal(found[name].double(), tensor.double())
    assert json.loads((tmp_path / "result" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("size", [1, 7_000, "0.02MB", "20 kb", "1GB"])
def test_shards(size: int | str, tmp_path: Path) -> None:
    most = {"0.02MB": 20_000, "20 kb": 20_000, "1GB": 10**9}.get(str(size), size)
    write(tmp_path / "source", draw("mixtral", 0))
    convert(tmp_path / "source", tmp_path / "result", max_shard_size=size)
    files = sorted((tmp_path / "result").glob("*.safetensors"))
    weight_map = {}
    for n, file in enumerate(files, start=1):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            weight_map |= dict.fromkeys(opened.keys(), file.name)
            stored = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118  (not a dict)
        if len(files) > 1:
            assert file.name == f"model-{n:05}-of-{len(files):05}.safetensors"
            assert sum(t.nbytes for t in stored) <= most or len(stored) <= 3  # q, k and v are one piece
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not (tmp_path / "result" / INDEX).exists()
    else:
        index = json.loads((tmp_path / "result" / INDEX).read_text())
        assert index["weight_map"] == weight_map
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "result").values())


def test_tensors_begin_at_multiples_of_their_numbers(tmp_path: Path) -> None:
    """5 numbers of 2 bytes before one of 4 would leave that one askew."""
    source = tmp_path / "source"
    write(
        source,
        TWIN | {"vocab_size": 5, "hidden_size": 5, "head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
    )
    given = tensors(source)
    save_file(
        {n: t.bfloat16() if n.endswith("embed_tokens.weight") else t for n, t in given.items()},
        source / "model.safetensors",
    )
    convert(source, tmp_path / "result")
    file = tmp_path / "result" / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    width = {"F32": 4, "BF16": 2}
    assert length % 8 == 0
    assert all(v["data_offsets"][0] % width[v["dtype"]] == 0 for n, v in header.items() if n != "__metadata__")
    assert same(tensors(tmp_path / "result"), tensors(source))


def test_what_is_not_weights_is_copied(tmp_path: Path) -> None:
    source, result = tmp_path / "source", tmp_path / "result"
    write_checkpoint(source, byte_level_tokenizer())
    write_tokenizer(source, byte_level_tokenizer())
    kept = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in ("chat_template.jinja", "tokenizer.model", "merges.txt", "LICENSE"):
        (source / name).write_text(name)
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "training.bin").write_text("optimizer")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "somebody/model"}))
    result.mkdir()  # an empty folder will do
    convert(source, result)
    assert {file.name for file in result.iterdir()} == kept | {
        "tokenizer.model", "merges.txt", "LICENSE", "config.json", "model.safetensors"
    }  # fmt: skip
    for name in kept | {"tokenizer.model", "merges.txt", "LICENSE"}:
        assert (result / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((result / "config.json").read_text()) == config | {"_name_or_path": "somebody/model"}
    model, copy = pyllama.load(source, device="cpu"), pyllama.load(result, device="cpu")
    assert copy.eos_token_ids == model.eos_token_ids
    assert str(pyllama.generate(copy, "The quick", 8)) == str(pyllama.generate(model, "The quick", 8))


def test_weights_of_eight_bits_are_written_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, TWIN)
    stored = {}
    for name, tensor in tensors(source).items():
        if ".layers." not in name or "norm" in name:
            stored[name] = tensor.bfloat16()
            continue
        stored[name] = tensor.to(torch.float8_e4m3fn)
        rows, columns = (-(-n // block) for n, block in zip(tensor.shape, EIGHT_BITS["weight_block_size"], strict=True))
        stored[f"{name}_scale_inv"] = torch.rand(rows, columns) + 0.5
    save_file(stored, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": EIGHT_BITS}))
    convert(source, tmp_path / "result")
    found = tensors(tmp_path / "result")
    assert found.keys() == tensors(source).keys() - {name for name in stored if name.endswith("_scale_inv")}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "result" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    for dtype in ("bfloat16",):
        models = [pyllama.load(folder, device="cpu", dtype=dtype) for folder in (source, tmp_path / "result")]
        assert same(*(dict(model.state_dict()) for model in models))


def test_leftovers_are_not_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, tie_word_embeddings=True)
    given = load_file(source / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    more["lm_head.weight"] = given["model.embed_tokens.weight"].clone()
    save_file(given | more, source / "model.safetensors")
    convert(source, tmp_path / "result")
    assert tensors(tmp_path / "result").keys() == given.keys()


def test_layers_of_multi_token_prediction_are_not_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, draw("glm4_moe", 1) | {"num_hidden_layers": 2})
    given = load_file(source / "model.safetensors")
    extra = {name.replace(".1.", ".2.", 1): tensor.clone() for name, tensor in given.items() if ".layers.1." in name}
    save_file(given | extra | {"model.layers.2.eh_proj.weight": torch.ones(1)}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    convert(source, tmp_path / "result")
    assert same(tensors(tmp_path / "result"), given)
    assert json.loads((tmp_path / "result" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert pyllama.load(tmp_path / "result", device="cpu").config.extra_layers == 0


def test_the_demo(tmp_path: Path) -> None:
    convert("demo", tmp_path / "result")
    expected, found = pyllama.load("demo", "cpu"), pyllama.load(tmp_path / "result", "cpu")
    assert same(dict(found.state_dict()), dict(expected.state_dict()))
    assert found.tokenizer is not None


def test_a_table_read_backwards() -> None:
    """Rules with interleaved rows, which no family of Hugging Face's names has, and what has no rule."""
    layer = LayerConfig(GQAConfig(2, 1, 4, None), MLPConfig(3))
    config = ModelConfig(7, 5, 16, 1e-6, False, (layer,))
    table = WeightTable((Rule("layers.{i}.attention.qkv", ("h.{i}.q", "h.{i}.k", "h.{i}.v"), 0, (4, 4, 0)),))
    rows = torch.arange(16)[:, None]
    found = unstack(table, config, "layers.0.attention.qkv", rows)
    assert found["h.0.q"].flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert found["h.0.k"].flatten().tolist() == [8, 10, 9, 11]
    assert found["h.0.v"].flatten().tolist() == [12, 13, 14, 15]
    with pytest.raises(ValueError, match="no rule of the table is for norm"):
        unstack(table, config, "norm", rows)
