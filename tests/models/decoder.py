"""A decoder in float64, written from the papers: the independent reference for the families' tests.

It reads a checkpoint's config.json and its tensors by their names in the files, and nothing of pyllama or
transformers. RoPE's angles are float32, rounded as everybody rounds them, since that is part of the models.
T tokens, D hidden size, H query heads, G key/value heads, K head size, E experts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Decoder:
    """Llama, Mistral, Mixtral and llama_moe, as the checkpoint in `folder` says."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: tensor.double() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
        }

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits [T, V] of one sequence [T]."""
        x_TD = self.weights["model.embed_tokens.weight"][token_ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x_TD = x_TD + self.attention(self.norm(x_TD, layer + "input_layernorm"), i)
            x_TD = x_TD + self.feed_forward(self.norm(x_TD, layer + "post_attention_layernorm"), layer)
        x_TD = self.norm(x_TD, "model.norm")
        head = "model.embed_tokens" if self.config.get("tie_word_embeddings") else "lm_head"
        return self.linear(x_TD, head)

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x.square().mean(dim=-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / rms * self.weights[name + ".weight"]

    def attention(self, x_TD: Tensor, i: int) -> Tensor:
        config, name = self.config, f"model.layers.{i}.self_attn."
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        q, k, v = (self.linear(x_TD, name + part).unflatten(-1, (-1, size)) for part in ("q_proj", "k_proj", "v_proj"))
        cos, sin = self.angles(len(x_TD), size)
        q, k = (half_turned(z, cos, sin) for z in (q, k))
        out = []
        for head in range(heads):
            group = head * k.shape[1] // heads
            scores = q[:, head] @ k[:, group].T / math.sqrt(size)
            distance = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))
            visible = (distance >= 0) & (distance < self.window(i))
            out.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v[:, group])
        return self.linear(torch.cat(out, dim=-1), name + "o_proj")

    def window(self, i: int) -> float:
        """How many tokens a token of layer i sees, its own included."""
        window = self.config.get("sliding_window")
        kinds = self.config.get("layer_types")
        return math.inf if window is None or (kinds and kinds[i] == "full_attention") else window

    def angles(self, tokens: int, size: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [T, 1, K / 2]."""
        config = self.config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or config["rope_theta"]
        kind = rope.get("rope_type") or rope.get("type") or "default"
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
        if kind == "linear":
            frequencies = frequencies / rope["factor"]
        if kind == "llama3":
            waves = 2 * math.pi / frequencies  # tokens per turn
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] / waves
            blend = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - blend) * frequencies / rope["factor"] + blend * frequencies
        angles = (torch.arange(tokens).float()[:, None] * frequencies)[:, None]
        return angles.double().cos(), angles.double().sin()

    def feed_forward(self, x_TD: Tensor, layer: str) -> Tensor:
        if layer + "mlp.gate_proj.weight" in self.weights:
            return self.swiglu(x_TD, *(f"{layer}mlp.{part}_proj" for part in ("gate", "up", "down")))
        if layer + "block_sparse_moe.gate.weight" in self.weights:
            name, parts = layer + "block_sparse_moe.", ("w1", "w3", "w2")
        else:
            name, parts = layer + "mlp.", ("gate_proj", "up_proj", "down_proj")
        out_TD = torch.zeros_like(x_TD)
        if name + "shared_expert.gate_proj.weight" in self.weights:
            out_TD = self.swiglu(x_TD, *(f"{name}shared_expert.{part}" for part in parts))
        probabilities_TE = self.linear(x_TD, name + "gate").softmax(dim=-1)
        for token, probabilities in enumerate(probabilities_TE):
            chosen = probabilities.argsort(descending=True)[: self.config["num_experts_per_tok"]]
            total = probabilities[chosen].sum() if self.config.get("norm_topk_prob", True) else 1.0
            for expert in chosen.tolist():
                result = self.swiglu(x_TD[token], *(f"{name}experts.{expert}.{part}" for part in parts))
                out_TD[token] += probabilities[expert] / total * result
        return out_TD

    def swiglu(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        gated = self.linear(x, gate)
        return self.linear(gated * gated.sigmoid() * self.linear(x, up), down)


def half_turned(z_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of dimensions (j, j + K / 2), turned by its angle."""
    a, b = z_THK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
