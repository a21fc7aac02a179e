"""`pyllama.load`: from a folder to a model that is ready to run, and what stops it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, byte_level_tokenizer, write_checkpoint, write_tokenizer

import pyllama
from pyllama import _C
from pyllama.architectures.reader import ConfigError
from pyllama.files import CheckpointError
from pyllama.loader import check_kernels_take, target_device
from pyllama.ops.registry import OPS, implementation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, byte_level_tokenizer())
    return tmp_path


MANY_EXPERTS = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 10**6}
MANY_EXPERTS |= dict.fromkeys(("attention_bias", "mlp_bias"), ...)


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not ...}))


def test_a_loaded_model_is_ready_to_run(folder: Path) -> None:
    model = pyllama.load(folder)
    assert not model.training
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("fox")) == "fox"
    assert all(parameter.requires_grad for parameter in model.parameters())  # and to be trained further
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("source", ["string", "path", "relative", "home"])
def test_a_folder_may_be_named_in_every_way(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    spelled = {"string": str(folder), "path": folder, "relative": folder.name, "home": f"~/{folder.name}"}[source]
    assert pyllama.load(spelled, device="cpu").config.vocab_size == 400


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_data_type(stored: torch.dtype, folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    default = torch.float64 if stored == torch.float64 else torch.float32
    assert pyllama.load(folder, device="cpu").dtype == default
    for wanted in ("float32", "bfloat16", torch.float16, torch.float64):
        model = pyllama.load(folder, device=torch.device("cpu"), dtype=wanted)
        wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", ["fp16", "float8_e4m3fn", torch.int8, torch.float8_e4m3fn, 16])
def test_other_data_types_are_refused(dtype: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, float64, got"):
        pyllama.load(folder, dtype=dtype)


def test_other_devices_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got meta"):
        pyllama.load(folder, device="meta")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {2, 7, 8, 9}),
        ({"eos_token_id": [7, 8]}, {}, {2, 7, 8}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {2}),
        ({"eos_token_id": ...}, {"eos_token_id": 0}, {0, 2}),
    ],
)
def test_every_eos_id_counts(
    config: dict[str, Any], generation: dict[str, Any], expected: set[int], folder: Path
) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", **config)
    if generation:
        change(folder / "generation_config.json", **generation)
    assert pyllama.load(folder).eos_token_ids == expected  # 2 is tokenizer_config.json's "</s>"


def test_an_eos_token_of_the_tokenizer_alone_counts(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    write_tokenizer(folder, byte_level_tokenizer(), eos_token={"content": "<|assistant|>", "special": True})
    assert pyllama.load(folder).eos_token_ids == {SPECIAL.index("<|assistant|>")}


@pytest.mark.parametrize("ids", ["2", -1, [2, None], 1.5, True])
def test_malformed_eos_ids_are_refused(ids: Any, folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id must be a token id or a list"):
        pyllama.load(folder)


def test_a_checkpoint_may_lack_a_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = pyllama.load(tmp_path)
    assert model.tokenizer is None
    assert model.eos_token_ids == {2}


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        pyllama.load(folder)


def test_leftovers_of_old_checkpoints_are_skipped(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = load_file(file)
    expected = pyllama.load(folder, device="cpu").state_dict()
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(before | old, file)
    found = pyllama.load(folder, device="cpu").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_head_in_the_file_is_skipped_only_where_it_is_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    head = before["model.embed_tokens.weight"].clone()
    save_file(before | {"lm_head.weight": head}, file)
    assert pyllama.load(tmp_path).head is None
    head[-1, -1] += 1
    for other in (head, head[1:].clone(), head.half()):
        save_file(before | {"lm_head.weight": other}, file)
        with pytest.raises(CheckpointError, match=r"lm_head.weight .* set tie_word_embeddings to false"):
            pyllama.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\] is not known; known: .*LlamaForCausalLM"),
        ({"attention_sinks": 4}, r"attention_sinks = 4.*ignore_config_keys=\['attention_sinks'\]"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_configurations_are_refused_with_their_folder(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(ConfigError, match=f"{folder}.*{message}"):
        pyllama.load(folder)


def test_ignored_keys(folder: Path) -> None:
    change(folder / "config.json", attention_sinks=4)
    assert pyllama.load(folder, ignore_config_keys=["attention_sinks"]).config.vocab_size == 400


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_configuration_that_is_not_json_is_named(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        pyllama.load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, "9 missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "9 not part of the model: model.layers.1"),
        ({"vocab_size": 401}, r"model.embed_tokens.weight \[400, 64\] should be \[401, 64\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight \[32, 64\], .* should stack to \[192, 64\]"),
        ({"attention_bias": True}, "8 missing: model.layers.0.self_attn.k_proj.bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight in .* is not model.embed_tokens.weight"),
        ({"num_hidden_layers": 20_000}, "describes 20000 layers .* the files hold only 21 tensors"),
        (MANY_EXPERTS, "2 layers and in them 2000000 experts, but the files hold only 21 tensors"),
    ],
)
def test_tensors_of_another_model_are_refused(config: dict[str, Any], message: str, folder: Path) -> None:
    change(folder / "config.json", **config)
    with pytest.raises(CheckpointError, match=message):
        pyllama.load(folder)


@pytest.mark.parametrize("keys", [["hidden_size", "vocab_size"], ["head_dim", "num_attention_heads"]])
def test_sizes_beyond_any_memory_are_refused(keys: list[str], folder: Path) -> None:
    change(folder / "config.json", num_key_value_heads=None, **dict.fromkeys(keys, 2**31 - 2))
    with pytest.raises(ConfigError, match="describes a tensor too large for any memory"):
        pyllama.load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors .* may be truncated or damaged; download it again"):
        pyllama.load(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("a/b/c", "there is no folder a/b/c"),
        ("..", "has no config.json"),
        (Path("nowhere"), "there is no folder nowhere"),
        ("", "source is empty"),
        ("owner/na me", "there is no folder owner/na me"),
    ],
)
def test_sources_that_are_not_there(
    source: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        pyllama.load(source)


def test_a_file_is_not_a_source(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is a file; give the folder"):
        pyllama.load(folder / "model.safetensors")


def test_a_file_of_another_format_than_its_name_says(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .* is not a complete file of torch.save"):
        pyllama.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_files_of_torch_save_give_the_same_model(name: str, folder: Path) -> None:
    expected = pyllama.load(folder, device="cpu").state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    found = pyllama.load(folder, device="cpu").state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_loading_within_inference_mode(folder: Path) -> None:
    """Which holds for the calling thread alone, while several copy."""
    expected = pyllama.load(folder, device="cpu").state_dict()
    with torch.inference_mode():
        found = pyllama.load(folder, device="cpu").state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_is_an_object(name: str, folder: Path) -> None:
    (folder / name).write_text("[1]")
    with pytest.raises(ConfigError, match=rf"{name} must hold a JSON object, got list"):
        pyllama.load(folder)


@pytest.mark.skipif(_C.cuda_version is None, reason="built without nvcc")
def test_a_gpu_without_code_gets_eager_ops_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 5))
    try:
        message = rf"{len(OPS)} of {len(OPS)} ops have no kernel for this GPU \(sm_35\)"
        with pytest.warns(UserWarning, match=message) as warned:
            assert target_device("cuda:0") == torch.device("cuda:0")
        assert len(warned) == 1
        assert implementation("rms_norm", "cuda") == "eager"
    finally:
        _C.enable("CUDA")


@pytest.mark.skipif(_C.cuda_version is None, reason="built without nvcc")
def test_kernels_take_no_float64() -> None:
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"do not take float64.*pyllama.eager"):
        check_kernels_take(torch.float64, gpu)
    with pyllama.eager():
        check_kernels_take(torch.float64, gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device is cuda:0, but torch .* finds no CUDA GPU; use device='cpu'"):
        pyllama.load(folder, device="cuda:0")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_checkpoints_own_type(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    model = pyllama.load(folder)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        exact = pyllama.load(folder, device="cpu", dtype="float64")(token_ids)
        found = pyllama.load(folder, device="cuda", dtype="float32")(token_ids.cuda())
    torch.testing.assert_close(found.double().cpu(), exact, rtol=0, atol=1e-3)


def test_the_vocabularies_of_tokenizer_and_model_may_differ(folder: Path) -> None:
    """Models round their vocabulary up; the tokenizer knows fewer tokens."""
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    write_checkpoint(folder, byte_level_tokenizer(), vocab_size=size + 24)
    model = pyllama.load(folder)
    assert model.config.vocab_size == size + 24
    assert pyllama.generate(model, [size + 23], 3).prompt_tokens == 1


def test_progress_is_shown_on_a_terminal_only(folder: Path) -> None:
    """On standard error, so that standard output stays the text."""
    arguments = [sys.executable, "-c", f"import pyllama; pyllama.load({str(folder)!r}); print('done')"]
    piped = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("done\n", "")
    ours, theirs = pty.openpty()
    shown = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    assert shown.stdout == "done\n"
    assert "loading" in os.read(ours, 10_000).decode()
    os.close(ours)
