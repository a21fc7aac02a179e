"""DeepSeek-V2 and V3 in float64, written from their papers (arXiv:2405.04434, arXiv:2412.19437).

H heads, R rotated dimensions of a head, E experts.
"""

from __future__ import annotations

import math

import torch
from decoder import Decoder, half_turned
from torch import Tensor


class DeepseekDecoder(Decoder):
    def attention(self, x_TD: Tensor, i: int) -> Tensor:
        config, name = self.config, f"model.layers.{i}.self_attn."
        tokens, heads = len(x_TD), config["num_attention_heads"]
        plain, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"]:
            q = self.linear(
                self.latent_norm(self.linear(x_TD, name + "q_a_proj"), name + "q_a_layernorm"), name + "q_b_proj"
            )
        else:
            q = self.linear(x_TD, name + "q_proj")
        latent, shared_key = self.linear(x_TD, name + "kv_a_proj_with_mqa").split([config["kv_lora_rank"], rotated], -1)
        kv = self.linear(self.latent_norm(latent, name + "kv_a_layernorm"), name + "kv_b_proj").unflatten(
            -1, (heads, -1)
        )
        q = q.unflatten(-1, (heads, -1))
        cos, sin = self.angles(tokens, rotated)
        turned_q = self.turned(q[..., plain:], cos, sin)
        turned_key = self.turned(shared_key[:, None], cos, sin)[:, 0]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        out = []
        for head in range(heads):
            scores = q[:, head, :plain] @ kv[:, head, :plain].T + turned_q[:, head] @ turned_key.T
            weights = (scores * self.scale()).masked_fill(hidden, -math.inf).softmax(dim=-1)
            out.append(weights @ kv[:, head, plain:])
        return self.linear(torch.cat(out, dim=-1), name + "o_proj")

    def latent_norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * self.weights[name + ".weight"]

    def turned(self, z_THR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs (2j, 2j + 1) turned; V3's variant with `rope_interleave` false: (j, j + R / 2)."""
        if not self.config.get("rope_interleave", True):
            return half_turned(z_THR, cos, sin)
        a, b = z_THR[..., 0::2], z_THR[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    def yarn(self) -> dict[str, float] | None:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        return rope if "yarn" in (rope.get("rope_type"), rope.get("type")) else None

    def scale(self) -> float:
        yarn = self.yarn() or {}
        size = self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]
        return stretch(yarn.get("factor", 1.0), yarn.get("mscale_all_dim", 0.0)) ** 2 / math.sqrt(size)

    def angles(self, tokens: int, size: int) -> tuple[Tensor, Tensor]:
        yarn = self.yarn()
        if yarn is None:
            return super().angles(tokens, size)
        theta, factor = yarn.get("rope_theta") or self.config["rope_theta"], yarn["factor"]
        original = yarn["original_max_position_embeddings"]

        def pair(turns: float) -> float:
            """Which pair turns so many times within the original context."""
            return size / 2 * math.log(original / (2 * math.pi * turns), theta)

        first = max(math.floor(pair(yarn.get("beta_fast", 32))), 0)
        last = min(math.ceil(pair(yarn.get("beta_slow", 1))), size - 1)
        periods = theta ** (torch.arange(0, size, 2).float() / size)
        slowed = ((torch.arange(size // 2).float() - first) / (max(last - first, 0.001))).clamp(0, 1)
        frequencies = 1 / (factor * periods) * slowed + 1 / periods * (1 - slowed)
        angles = (torch.arange(tokens).float()[:, None] * frequencies)[:, None].double()
        magnitude = stretch(factor, yarn.get("mscale", 1.0)) / stretch(factor, yarn.get("mscale_all_dim", 0.0))
        return angles.cos() * magnitude, angles.sin() * magnitude

    def feed_forward(self, x_TD: Tensor, layer: str) -> Tensor:
        name, parts = layer + "mlp.", ("gate_proj", "up_proj", "down_proj")
        if name + "gate.weight" not in self.weights:
            return self.swiglu(x_TD, *(name + part for part in parts))
        out_TD = torch.zeros_like(x_TD)
        if self.config["n_shared_experts"]:
            out_TD = self.swiglu(x_TD, *(f"{name}shared_experts.{part}" for part in parts))
        logits_TE = self.linear(x_TD, name + "gate")
        for token, logits in enumerate(logits_TE):
            for expert, weight in self.route(logits, self.weights.get(name + "gate.e_score_correction_bias")):
                out_TD[token] += weight * self.swiglu(
                    x_TD[token], *(f"{name}experts.{expert}.{part}" for part in parts)
                )
        return out_TD

    def route(self, logits_E: Tensor, bias_E: Tensor | None) -> list[tuple[int, float]]:
        """A token's experts and their weights. With a bias it is V3's router, else V2's."""
        config, experts = self.config, range(len(logits_E))
        scores = (logits_E.softmax(dim=-1) if bias_E is None else logits_E.sigmoid()).tolist()
        worth = scores if bias_E is None else (torch.tensor(scores, dtype=torch.float64) + bias_E).tolist()
        if bias_E is not None or config["topk_method"] == "group_limited_greedy":
            size = len(experts) // config["n_group"]
            groups = [experts[first : first + size] for first in range(0, len(experts), size)]
            best = 1 if bias_E is None else 2
            groups.sort(key=lambda group: -sum(sorted((worth[e] for e in group), reverse=True)[:best]))
            experts = [expert for group in groups[: config["topk_group"]] for expert in group]
        chosen = sorted(experts, key=lambda expert: -worth[expert])[: config["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) if bias_E is not None and config["norm_topk_prob"] else 1.0
        return [(expert, scores[expert] / total * config["routed_scaling_factor"]) for expert in chosen]


def stretch(factor: float, mscale: float) -> float:
    """YaRN's growth of the scores with the context, its strength set by `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1
