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
    """Llama, Mistral, Mixtral, llama_moe, Phi-3, the Qwens, OLMoE and GLM-4-MoE, as the checkpoint in `folder` says."""

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
        q, k, v = self.queries_keys_values(x_TD, name, size)
        cos, sin = self.angles(len(x_TD), size)
        q, k = (turned(z, cos, sin) for z in (q, k))
        out = []
        for head in range(heads):
            group = head * k.shape[1] // heads
            scores = q[:, head] @ k[:, group].T / math.sqrt(size)
            distance = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))
            visible = (distance >= 0) & (distance < self.window(i))
            out.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v[:, group])
        return self.linear(torch.cat(out, dim=-1), name + "o_proj")

    def queries_keys_values(self, x_TD: Tensor, name: str, size: int) -> list[Tensor]:
        """Each [T, heads, K], before RoPE."""
        if name + "qkv_proj.weight" in self.weights:
            kv_rows = size * self.config["num_key_value_heads"]
            qkv = list(self.linear(x_TD, name + "qkv_proj").tensor_split([-2 * kv_rows, -kv_rows], dim=-1))
        else:
            qkv = [self.linear(x_TD, name + part) for part in ("q_proj", "k_proj", "v_proj")]
        if self.config["model_type"] != "olmoe":  # its norms are over all heads at once
            qkv = [z.unflatten(-1, (-1, size)) for z in qkv]
        if name + "q_norm.weight" in self.weights:
            qkv[:2] = self.norm(qkv[0], name + "q_norm"), self.norm(qkv[1], name + "k_norm")
        limit = self.config.get("clip_qkv") or math.inf
        return [z.clamp(-limit, limit).view(len(x_TD), -1, size) for z in qkv]

    def window(self, i: int) -> float:
        """How many tokens a token of layer i sees, its own included."""
        window = self.config.get("sliding_window")
        kinds = self.config.get("layer_types")
        return math.inf if window is None or (kinds and kinds[i] == "full_attention") else window

    def angles(self, tokens: int, size: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [T, 1, R / 2], where R of the head's dimensions are rotated."""
        frequencies, magnitude = frequencies_and_magnitude(self.config, tokens, size)
        angles = (torch.arange(tokens).float()[:, None] * frequencies)[:, None].double()
        return angles.cos() * magnitude, angles.sin() * magnitude

    def feed_forward(self, x_TD: Tensor, layer: str) -> Tensor:
        name, parts = layer + "mlp.", ("gate_proj", "up_proj", "down_proj")
        if layer + "block_sparse_moe.gate.weight" in self.weights:
            name, parts = layer + "block_sparse_moe.", ("w1", "w3", "w2")
        if name + "gate.weight" not in self.weights:
            return self.swiglu(x_TD, *(name + part for part in parts))
        out_TD = torch.zeros_like(x_TD)
        for shared in ("shared_expert", "shared_experts"):
            if f"{name}{shared}.gate_proj.weight" in self.weights:
                out_TD = self.swiglu(x_TD, *(f"{name}{shared}.{part}" for part in parts))
            if f"{name}{shared}_gate.weight" in self.weights:
                out_TD = self.linear(x_TD, f"{name}{shared}_gate").sigmoid() * out_TD
        for expert, weights_T in enumerate(self.routing(x_TD, name).T):
            tokens = weights_T.nonzero().flatten()
            result = self.swiglu(x_TD[tokens], *(f"{name}experts.{expert}.{part}" for part in parts))
            out_TD[tokens] += weights_T[tokens, None] * result
        return out_TD

    def routing(self, x_TD: Tensor, name: str) -> Tensor:
        """[T, E]: the weight of each expert, 0 where it is not chosen."""
        config, bias = self.config, self.weights.get(name + "gate.e_score_correction_bias")
        logits_TE = self.linear(x_TD, name + "gate")
        scores_TE = logits_TE.softmax(dim=-1) if bias is None else logits_TE.sigmoid()
        choice_TE = scores_TE if bias is None else scores_TE + bias
        weights_TE = torch.zeros_like(scores_TE)
        for token, (scores, choice) in enumerate(zip(scores_TE, choice_TE, strict=True)):
            allowed = range(len(scores))
            if (groups := config.get("n_group") or 1) > 1:
                members = list(torch.arange(len(scores)).chunk(groups))
                members.sort(key=lambda group: -choice[group].sort().values[-2:].sum())
                allowed = torch.cat(members[: config["topk_group"]]).tolist()
            chosen = sorted(allowed, key=lambda expert: -choice[expert])[: config["num_experts_per_tok"]]
            total = scores[chosen].sum() if config.get("norm_topk_prob", True) else 1.0
            weights_TE[token, chosen] = scores[chosen] / total * config.get("routed_scaling_factor", 1.0)
        return weights_TE

    def swiglu(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        if gate + ".weight" in self.weights:
            gated, up_x = self.linear(x, gate), self.linear(x, up)
        else:  # Phi-3's are packed
            gated, up_x = self.linear(x, gate.replace("gate_proj", "gate_up_proj")).chunk(2, dim=-1)
        return self.linear(gated * gated.sigmoid() * up_x, down)


def frequencies_and_magnitude(config: dict[str, Any], tokens: int, size: int) -> tuple[Tensor, float]:
    """RoPE's angle per token of each pair of dimensions, and the factor of the cosines and sines."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    size = int(size * rope.get("partial_rotary_factor", 1.0))
    periods = theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    frequencies, magnitude = 1.0 / periods, 1.0
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    if kind == "llama3":
        turns = original / (2 * math.pi * periods)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    if kind == "yarn":
        factor = rope["factor"]
        # Pair j turns as often as `turns` in the original context where theta^(2j / R) = original / (2 pi turns).
        first, last = (
            size / 2 * math.log(original / (2 * math.pi * turns), theta)
            for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
        )
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        ramp = ((torch.arange(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        frequencies = frequencies / factor * ramp + frequencies * (1 - ramp)
        sizes = [0.1 * rope.get(key, 0) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim")]
        magnitude = sizes[0] / sizes[1] if min(sizes) > 1 else 0.1 * math.log(factor) + 1
    if kind == "longrope":
        factor = config["max_position_embeddings"] / original
        frequencies = 1.0 / (torch.tensor(rope["long_factor" if tokens > original else "short_factor"]) * periods)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies, rope.get("attention_factor") or magnitude


def turned(z_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dimensions, as many as there are angles for, turned; the rest as they are."""
    rotated, kept = z_THK.tensor_split([2 * cos.shape[-1]], dim=-1)
    return torch.cat((half_turned(rotated, cos, sin), kept), dim=-1)


def half_turned(z_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of dimensions (j, j + K / 2), turned by its angle."""
    a, b = z_THK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
