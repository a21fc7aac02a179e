"""Training against transformers in float64: losses, every gradient, whole runs, and what is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import OPTIONS, draw, write, write_llama_moe
from safetensors.torch import load_file
from test_deepseek import FAMILIES as DEEPSEEK
from test_deepseek import draw as draw_deepseek
from test_minimind import write_research
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import pyllama
from pyllama.architectures import find_family
from pyllama.model import Model
from pyllama.save import unstack

WITH_AUX_LOSS = "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"  # in transformers
FAMILIES = [*OPTIONS, *DEEPSEEK]


def config_of(family: str, seed: int) -> dict[str, Any]:
    config = draw_deepseek(family, seed) if family in DEEPSEEK else draw(family, seed)
    # A weight that shows. DeepSeek-V2's loss is its own (test_balance.py), and V3 and GLM have none.
    weights = {
        "deepseek_v2": {"aux_loss_alpha": 0.0},
        **{name: {"router_aux_loss_coef": 0.3} for name in WITH_AUX_LOSS},
    }
    return config | weights.get(family, {})


class Exact(TorchFunctionMode):
    """transformers in float64: what it computes in float32, whatever the model's type, stays what it is."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "histc":  # of experts, whose shares follow
            return function(*args, **kwargs).double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if name == "float" or (name in ("to", "type") and torch.float32 in (*args[1:], kwargs.get("dtype"))):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return function(*args, **kwargs)


def reference_model(folder: Path) -> PreTrainedModel:
    # float64 from the beginning: a later .double() would take RoPE's frequencies with it, which are of float32.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def reference_loss(model: PreTrainedModel, token_ids: Tensor, labels: Tensor) -> Tensor:
    sparse = any("experts" in name for name, _ in model.named_parameters())  # some of Qwen's have dense layers alone
    options = {"output_router_logits": True} if sparse and model.config.model_type in WITH_AUX_LOSS else {}
    with Exact():
        return model(token_ids, labels=labels, **options).loss


def batch(family: str, seed: int, sequences: int = 3, length: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(211, (sequences, length), generator=generator)
    labels = token_ids.masked_fill(torch.rand(token_ids.shape, generator=generator) < 0.2, -100)
    return token_ids, labels


def as_tensors(model: Model, of: Callable[[Tensor], Tensor | None], folder: Path) -> dict[str, Tensor]:
    """Something of each parameter, under the names of the checkpoint's tensors."""
    names = find_family(json.loads((folder / "config.json").read_text())).weights(model.config)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if (value := of(parameter)) is not None:
            found |= unstack(names, model.config, name, value)
    return found


def gradients_as_tensors(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """transformers' gradients under the names of the checkpoint's tensors: it saves a model that consists of them."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_transformers(family: str, seed: int, tmp_path: Path) -> None:
    write(tmp_path / "model", config_of(family, seed))
    token_ids, labels = batch(family, seed)
    reference, model = reference_model(tmp_path / "model"), pyllama.load(tmp_path / "model", "cpu", "float64")
    expected = reference_loss(reference, token_ids, labels)
    expected.backward()
    loss = model(token_ids, labels).loss
    loss.backward()
    # DeepSeek-V2's angles become cosines by another function there, of float32.
    precision = 1e-7 if family == "deepseek_v2" else 1e-11
    torch.testing.assert_close(loss, expected, rtol=precision, atol=0)
    expected_gradients = gradients_as_tensors(reference, tmp_path / "gradients")
    found = as_tensors(model, lambda parameter: parameter.grad, tmp_path / "model")
    expected_gradients = {n: g for n, g in expected_gradients.items() if not n.endswith("e_score_correction_bias")}
    assert found.keys() == expected_gradients.keys()
    most = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in found.items():
        expected = expected_gradients[name]
        torch.testing.assert_close(gradient, expected, rtol=10 * precision, atol=precision * most, msg=name)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek_v3"])
def test_a_run_has_the_losses_of_transformers(family: str, tmp_path: Path) -> None:
    """30 steps from the same weights with the same data, and then the same weights again."""
    write(tmp_path / "model", config_of(family, 1) | {"num_hidden_layers": 2})
    reference, model = reference_model(tmp_path / "model"), pyllama.load(tmp_path / "model", "cpu", "float64")
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False}
    optimizers = [torch.optim.AdamW(one.parameters(), **options) for one in (reference, model)]
    expected, losses = [], []
    for step in range(30):
        token_ids, labels = batch(family, step % 3, sequences=2, length=16)
        expected.append(reference_loss(reference, token_ids, labels))
        losses.append(model(token_ids, labels).loss)
        for optimizer, loss in zip(optimizers, (expected[-1], losses[-1]), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-6, atol=0)
    model.save(tmp_path / "trained")
    saved = load_file(tmp_path / "trained" / "model.safetensors")
    reference.save_pretrained(tmp_path / "expected")
    trained = load_file(tmp_path / "expected" / "model.safetensors")
    assert saved.keys() == trained.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight.double(), trained[name].double(), rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, "llama_moe"])
def test_what_is_saved_is_the_model(family: str, tmp_path: Path) -> None:
    """For transformers and for pyllama, after a step of training; beside it lies what lay beside what was loaded."""
    if family == "llama_moe":
        write_llama_moe(tmp_path / "model")
    else:
        write(tmp_path / "model", config_of(family, 4))
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "model" / "LICENSE").write_text("terms")
    model = pyllama.load(tmp_path / "model", "cpu").train()
    token_ids, labels = batch(family, 0)
    model(token_ids, labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save(tmp_path / "saved")
    loaded = pyllama.load(tmp_path / "saved", "cpu")
    assert loaded.config == replace(model.config, extra_layers=0)
    assert loaded.eos_token_ids == {7, *model.eos_token_ids}
    for (name, parameter), copy in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, copy), name
    assert (tmp_path / "saved" / "LICENSE").read_text() == "terms"
    if family != "llama_moe":
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(token_ids).logits
            found = loaded(token_ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())


def test_saving_in_another_type_and_in_shards(tmp_path: Path) -> None:
    write(tmp_path / "model", config_of("deepseek_v3", 0))
    model = pyllama.load(tmp_path / "model", "cpu")
    model.save(tmp_path / "saved", dtype="bfloat16", max_shard_size="50 kB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = pyllama.load(tmp_path / "saved", "cpu", "bfloat16")
    for (name, parameter), copy in zip(model.named_parameters(), loaded.parameters(), strict=True):
        exact = "correction_bias" in name  # which chooses: it is not made coarser
        assert torch.equal(parameter if exact else parameter.bfloat16(), copy), name


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    """A layer's are too many for one file, or for memory twice."""
    write(tmp_path / "model", config_of("mixtral", 0))
    model = pyllama.load(tmp_path / "model", "cpu")
    one = model.layers[0].ffn.gate_up[0].nbytes
    rest = max(p.nbytes for p in model.parameters() if p.ndim < 3)
    model.save(tmp_path / "saved", max_shard_size=max(one, rest))
    most = max(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert most <= max(one, rest) + 2000  # a header


def test_saving_finds_the_tokenizer_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", config_of("llama", 0))
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    model = pyllama.load("model", "cpu")
    model.layers[0] = torch.compile(model.layers[0])  # a level more in its parameters' names
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save("saved")
    assert (tmp_path / "elsewhere" / "saved" / "tokenizer_config.json").read_text() == "{}"
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"model, whose tokenizer belongs to the model, is not there any more"):
        model.save("again")
    assert [path.name for path in Path().iterdir()] == ["saved"]


def test_nothing_is_saved_over_or_by_half(tmp_path: Path) -> None:
    write(tmp_path / "model", config_of("llama", 0))
    model = pyllama.load(tmp_path / "model", "cpu")
    with pytest.raises(FileExistsError, match=r"model is not an empty folder, and nothing is written over"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes, or one as in '5GB'"):
        model.save(tmp_path / "saved", max_shard_size="5 parsecs")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, float64, got 'int8'"):
        model.save(tmp_path / "saved", dtype="int8")
    (tmp_path / "model" / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link out of its folder"):
        model.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match=r"was not loaded, so it has no config\.json"):
        Model(model.config).save(tmp_path / "saved")


def drop(config: dict[str, Any], **chances: float) -> dict[str, Any]:
    return config | {"num_hidden_layers": 2} | chances


@pytest.mark.parametrize(
    "config",
    [
        drop(config_of("llama", 0), attention_dropout=0.3),
        drop(config_of("mistral", 3), attention_dropout=0.3, sliding_window=7),
        drop(config_of("phi3", 0), attention_dropout=0.3, resid_pdrop=0.2),
        drop(config_of("phi3", 1), resid_pdrop=0.5),
        drop(config_of("deepseek_v3", 0), attention_dropout=0.3),
        drop(config_of("mixtral", 1), attention_dropout=0.3),
    ],
    ids=lambda config: config["model_type"],
)
def test_dropout_is_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    """From the same state of torch's generator the same numbers are dropped; none in evaluation."""
    write(tmp_path, config)
    reference, model = reference_model(tmp_path), pyllama.load(tmp_path, "cpu", "float64")
    reference.set_attn_implementation("eager")
    token_ids, labels = batch("", 0)

    def losses(training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        expected = reference_loss(reference.train(training), token_ids, labels)
        torch.manual_seed(0)
        return [expected, model.train(training)(token_ids, labels).loss]

    dropped, whole = losses(True), losses(False)
    assert abs(dropped[0] - whole[0]) > 1e-3
    for expected, loss in (dropped, whole):
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    weights = reference.get_input_embeddings().weight, model.embedding.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip(dropped, weights, strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("given", "kind"), [(..., "sequence"), (True, "sequence"), (False, "batch")])
@pytest.mark.parametrize("family", ["deepseek_v2", "research"])
def test_which_loss_balances_experts(family: str, given: Any, kind: str, tmp_path: Path) -> None:
    """DeepSeek's key, in its family and in MiniMind's research models; without it as if it were true."""
    if family == "research":
        write_research(tmp_path, seq_aux=given)
    else:
        write(tmp_path, config_of(family, 0) | {"first_k_dense_replace": 0})
        config = json.loads((tmp_path / "config.json").read_text()) | {"seq_aux": given}
        config = {key: value for key, value in config.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = pyllama.load(tmp_path, "cpu")
    assert {layer.ffn.aux_loss for layer in model.config.layers} == {kind}
