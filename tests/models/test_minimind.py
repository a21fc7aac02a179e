"""Small research models in Meta's names against a float64 forward pass that is written here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_meta import VOCAB, tokens
from torch import Tensor

import pyllama
from pyllama.architectures.reader import ConfigError
from pyllama.config import MLPConfig, MoEConfig
from pyllama.files import CheckpointError

RESEARCH = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 3,
    "vocab_size": VOCAB,
    "hidden_dim": None,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "max_seq_len": 512,
    "dropout": 0.1,
    "flash_attn": True,
    "use_moe": True,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": True,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.01,
    "seq_aux": True,
    "norm_topk_prob": True,
}


def research_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """A random state dict as the reference implementation saves it, its attention mask and tied head included."""
    D, F, K = config["dim"], config["hidden_dim"] or 128, config["dim"] // config["n_heads"]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)

    def feed_forward(name: str) -> dict[str, Tensor]:
        return {f"{name}.w1.weight": random(F, D), f"{name}.w2.weight": random(D, F), f"{name}.w3.weight": random(F, D)}

    embedding = random(config["vocab_size"], D)
    tensors = {"tok_embeddings.weight": embedding, "output.weight": embedding, "norm.weight": 1 + random(D)}
    for i in range(config["n_layers"]):
        heads, kv_heads = config["n_heads"], config["n_kv_heads"]
        for name, rows in (("wq", heads * K), ("wk", kv_heads * K), ("wv", kv_heads * K)):
            tensors[f"layers.{i}.attention.{name}.weight"] = random(rows, D)
        tensors[f"layers.{i}.attention.wo.weight"] = random(D, heads * K)
        tensors[f"layers.{i}.attention.mask"] = torch.zeros(1, 1, 512, 512)
        tensors[f"layers.{i}.attention_norm.weight"] = 1 + random(D)
        tensors[f"layers.{i}.ffn_norm.weight"] = 1 + random(D)
        ffn = f"layers.{i}.feed_forward"
        if not config["use_moe"]:
            tensors |= feed_forward(ffn)
            continue
        tensors[f"{ffn}.gate.weight"] = random(config["n_routed_experts"], D)
        for e in range(config["n_routed_experts"]):
            tensors |= feed_forward(f"{ffn}.experts.{e}")
        if config["n_shared_experts"] is not None:
            tensors |= feed_forward(f"{ffn}.shared_experts")
    return tensors


def research_logits(config: dict[str, Any], tensors: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    """The forward pass in float64: RoPE as complex numbers, the experts one token at a time. Logits [T, V]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads, size = config["n_heads"], config["n_kv_heads"], config["dim"] // config["n_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def feed_forward(x: Tensor, name: str) -> Tensor:
        gate, up = x @ weights[f"{name}.w1.weight"].T, x @ weights[f"{name}.w3.weight"].T
        return (gate * gate.sigmoid() * up) @ weights[f"{name}.w2.weight"].T

    def mixture(x: Tensor, name: str) -> Tensor:
        probabilities = (weights[f"{name}.gate.weight"] @ x).softmax(-1)
        top_k = config["num_experts_per_tok"]
        chosen = probabilities.argsort(descending=True)[:top_k].tolist()
        total = probabilities[chosen].sum() if config["norm_topk_prob"] and top_k > 1 else 1.0
        out = sum(probabilities[e] / total * feed_forward(x, f"{name}.experts.{e}") for e in chosen)
        return out if config["n_shared_experts"] is None else out + feed_forward(x, f"{name}.shared_experts")

    frequencies = 1.0 / config.get("rope_theta", 10_000.0) ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(len(token_ids)).float(), frequencies).double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    causal = torch.ones(len(token_ids), len(token_ids)).tril().bool()
    x = weights["tok_embeddings.weight"][token_ids]
    for i in range(config["n_layers"]):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.attention_norm")
        q, k, v = (h @ weights[f"{layer}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        q, k, v = (z.unflatten(-1, (-1, size)) for z in (q, k, v))
        q, k = rotated(q), rotated(k)
        k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(size)
        shares = scores.masked_fill(~causal, -math.inf).softmax(-1)
        x = x + torch.einsum("hts,shk->thk", shares, v).flatten(1) @ weights[f"{layer}.attention.wo.weight"].T
        h = norm(x, f"{layer}.ffn_norm")
        name = f"{layer}.feed_forward"
        x = x + (torch.stack([mixture(row, name) for row in h]) if config["use_moe"] else feed_forward(h, name))
    return norm(x, "norm") @ weights["output.weight"].T


def write_research(folder: Path, file: str = "config.json", **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {key: value for key, value in (RESEARCH | changes).items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(config))
    tensors = research_tensors(RESEARCH | config)
    torch.save(tensors, folder / "full_sft_48_moe.pth")
    return RESEARCH | config, tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_moe": False},
        {"hidden_dim": 40},
        {"n_shared_experts": None},
        {"n_shared_experts": False},  # one all the same
        {"n_shared_experts": 2},  # one all the same
        {"num_experts_per_tok": 1},  # keeps its probability
        {"norm_topk_prob": False, "num_experts_per_tok": 3, "n_kv_heads": 6},
        {"num_experts_per_tok": 4, "rope_theta": 1_000_000},  # all of them
        {"aux_loss_alpha": 0.0, "hidden_dim": ..., "n_kv_heads": 1},
        {
            "architectures": ["MiniMindLM"],
            "model_type": "minimind",
            "auto_map": {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.MiniMindLM"},
            "torch_dtype": "float32",
            "transformers_version": "4.44.0",
        },
    ],
    ids=str,
)
@torch.no_grad()
def test_research_models_against_float64(changes: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = write_research(tmp_path, **changes)
    token_ids = tokens(40)
    exact = research_logits(config, tensors, token_ids)
    model = pyllama.load(tmp_path, device="cpu")
    assert model.head is None  # tied
    assert (model(token_ids[None])[0].double() - exact).abs().max() < 1e-5 * exact.std()
    in_float64 = pyllama.load(tmp_path, device="cpu", dtype="float64")(token_ids[None])[0]
    assert (in_float64 - exact).abs().max() < 1e-6 * exact.std()

    written = pyllama.generate(model, token_ids[:9].tolist(), 12).token_ids
    text = torch.cat((token_ids[:9], torch.tensor(written)))
    assert research_logits(config, tensors, text)[8:-1].argmax(-1).tolist() == written


def test_research_models_in_params_json(tmp_path: Path) -> None:
    write_research(tmp_path, "params.json", eos_token_id=2)
    config = pyllama.load(tmp_path, device="cpu").config
    assert config.max_positions == 512
    ffn = MoEConfig(4, 2, 128, shared=MLPConfig(128), aux_loss="sequence", aux_loss_coef=0.01)
    assert config.layers[0].ffn == ffn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "config.json: scoring_func = 'sigmoid': only 'softmax' is supported"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5: there are only 4"),
        ({"attention_sinks": 4}, r"not known.*attention_sinks = 4"),
        ({"hidden_dim": 0}, "hidden_dim must be a positive integer, got 0"),
        ({"architectures": ["MiniMindForCausalLM"]}, r"\['MiniMindForCausalLM'\] is not known"),
    ],
)
def test_what_research_models_may_not_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_research(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        pyllama.load(tmp_path)
    if "scoring_func" in changes:  # of the experts that a dense model does not have
        write_research(tmp_path, **changes, use_moe=False)
        assert pyllama.load(tmp_path, device="cpu").config.layers[0].ffn == MLPConfig(128)


def test_a_head_that_is_not_tied_is_noticed(tmp_path: Path) -> None:
    _, tensors = write_research(tmp_path)
    torch.save(tensors | {"output.weight": tensors["output.weight"] + 1}, tmp_path / "full_sft_48_moe.pth")
    with pytest.raises(CheckpointError, match=r"output.weight in .* is not tok_embeddings.weight"):
        pyllama.load(tmp_path)
    config = RESEARCH | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pyllama.load(tmp_path, device="cpu").head is not None
