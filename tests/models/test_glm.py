"""What is GLM-4-MoE's own: a router in float32 with a bias for the choice alone, and layers that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import draw, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM

import pyllama
from pyllama.weights import CheckpointError

LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm4_moe")
    config = draw("glm4_moe", 5) | {"num_hidden_layers": LAYERS, "first_k_dense_replace": 1, "vocab_size": 211}
    config |= {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    write(path, config | {"num_nextn_predict_layers": 1})
    return path


def chosen(reference: Glm4MoeForCausalLM, x_TD: Tensor) -> list[set[int]]:
    """The experts of each token in the last layer, by transformers."""
    return [set(row) for row in reference.model.layers[-1].mlp.gate(x_TD)[2].tolist()]


@torch.no_grad()
def test_bfloat16_models_choose_transformers_experts(folder: Path) -> None:
    """Of the same hidden states; the product in bfloat16 would choose others."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model = pyllama.load(folder, device="cpu", dtype="bfloat16")
    moe = model.layers[-1].ffn
    assert moe.router.weight.dtype == torch.bfloat16
    assert moe.correction_bias.dtype == torch.float32
    x_TD = torch.randn(500, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = model.layers[-1].ffn_norm
    expected = chosen(reference, norm(x_TD))
    _, routing = moe(x_TD.clone(), norm, with_logits=True)
    assert routing.logits.dtype == torch.float32
    assert [set(row) for row in routing.experts.tolist()] == expected
    gate = reference.model.layers[-1].mlp.gate
    x_TD = norm(x_TD)
    rounded = gate.weight.float().matmul(x_TD.float().T).bfloat16().float().sigmoid().T + gate.e_score_correction_bias
    exact = gate.weight.float().matmul(x_TD.float().T).sigmoid().T + gate.e_score_correction_bias
    assert (rounded.argsort(dim=-1) != exact.argsort(dim=-1)).any()  # there are choices that rounding changes


@torch.no_grad()
def test_the_correction_bias_changes_the_choice_alone(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = pyllama.load(folder, device="cpu")
    x_TD = torch.randn(100, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    layer = model.layers[-1]
    normed_TD = layer.ffn_norm(x_TD)
    with_bias = chosen(reference, normed_TD)
    out_TD, routing = layer.ffn(x_TD, layer.ffn_norm, with_logits=True)
    assert [set(row) for row in routing.experts.tolist()] == with_bias
    torch.testing.assert_close(out_TD - x_TD, reference.model.layers[-1].mlp(normed_TD[None])[0], rtol=0, atol=1e-5)
    reference.model.layers[-1].mlp.gate.e_score_correction_bias.zero_()
    without = chosen(reference, normed_TD)
    assert sum(a != b for a, b in zip(with_bias, without, strict=True)) > 30


def test_layers_of_multi_token_prediction_are_left_out(folder: Path, tmp_path: Path) -> None:
    """As many as config.json says; others are no part of the model, and refused."""
    token_ids = torch.arange(40)[None]
    expected = pyllama.load(folder, device="cpu")(token_ids)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    extra = {
        f"model.layers.{LAYERS}.{name}": torch.ones(3) for name in ("eh_proj.weight", "mlp.experts.0.up_proj.weight")
    }
    save_file(weights | extra, tmp_path / "model.safetensors")
    assert torch.equal(pyllama.load(tmp_path, device="cpu")(token_ids), expected)

    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=rf"2 not part of the model: model.layers.{LAYERS}.eh_proj.weight"):
        pyllama.load(tmp_path, device="cpu")
